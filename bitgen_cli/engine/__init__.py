"""The engine: tensors only. It never prints, never reads presets.

Shape legend, used in every docstring and as name suffixes where a layout changes:

    B  pictures in a batch
    C  latent channels, equal to the number of bits d of the tokenizer
    h w  one scale of the latent grid; H W the full (last) scale
    K  bits per position the transformer predicts: C, or 4C when patchified
    L  positions over all scales of a schedule
    D  width of the transformer
    T  text positions of a prompt
    N  attention heads, E channels of one head

Images are float [-1, 1], RGB, channel first. Bits are bool. Codes are +-1/sqrt(d).
Two logits per bit, as published: channel 2j is "bit j = 0", channel 2j + 1 is "bit j = 1".
"""
