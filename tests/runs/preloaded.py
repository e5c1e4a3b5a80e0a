"""What the server of processes.py has done before a process begins: imports, and a table that is built at first use."""

from contextlib import suppress
from importlib import import_module

for name in (
    *("torch.distributed.fsdp", "torch.optim", "transformers.models.t5.modeling_t5"),
    *("bitgen_cli.app", "bitgen_cli.runs.finetune_subject", "bitgen_cli.runs.resume", "bitgen_cli.runs.sample"),
):
    import_module(name)

# of how the weights of all models of transformers are named: to load a tiny one takes half as long as to build that
with suppress(ImportError):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("t5")
