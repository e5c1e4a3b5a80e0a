# bash completion for bitgen. Written by completions/generate.py; do not edit.

_bitgen() {
    local IFS=$' \t\n' command= word words= paths= options=
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
    # --option=value comes as three words
    if [[ $current == '=' ]]; then
        current=
    elif [[ $before == '=' ]]; then
        before=${COMP_WORDS[COMP_CWORD-2]}
    fi
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        if [[ $word != -* ]]; then
            command=$word
            break
        fi
    done
    case "$command $before" in
        'sample --model') words='demo infinity-2b infinity-8b infinity-8b-512 infinity-vae-d16 infinity-vae-d24 infinity-vae-d32 infinity-vae-d64' paths=files ;;
        'sample --num-images'|'sample -n') words='' paths= ;;
        'sample --prompts') words='' paths=files ;;
        'sample --recipe') words='' paths=files ;;
        'sample --from') words='' paths=files ;;
        'sample --seed') words='' paths= ;;
        'sample --mask') words='' paths=files ;;
        'sample --keep-scales') words='' paths= ;;
        'sample --cfg') words='' paths= ;;
        'sample --cfg-layer') words='' paths= ;;
        'sample --tau') words='' paths= ;;
        'sample --target-confidence') words='' paths= ;;
        'sample --top-k') words='' paths= ;;
        'sample --top-p') words='' paths= ;;
        'sample --fast') words='0 1 2 3' paths= ;;
        'sample --refine') words='' paths= ;;
        'sample --negative-prompt') words='' paths= ;;
        'sample --aspect') words='' paths= ;;
        'sample --resolution') words='0.06M 0.25M 0.60M 1M' paths= ;;
        'sample --bits') words='' paths= ;;
        'sample --subject') words='' paths=files ;;
        'sample --output'|'sample -o') words='' paths=files ;;
        'sample --save-scales') words='strip webp' paths= ;;
        'sample --batch-size') words='' paths= ;;
        'sample --device') words='auto cpu cuda mps' paths= ;;
        'sample --dtype') words='auto fp32 bf16 fp16' paths= ;;
        'sample --offload') words='auto none cpu' paths= ;;
        'sample --text-dtype') words='auto fp32 bf16 int8' paths= ;;
        'sample --set') words='' paths= ;;
        'tokenize --model') words='demo infinity-2b infinity-8b infinity-8b-512 infinity-vae-d16 infinity-vae-d24 infinity-vae-d32 infinity-vae-d64' paths=files ;;
        'tokenize --resolution') words='0.06M 0.25M 0.60M 1M' paths= ;;
        'tokenize --aspect') words='' paths= ;;
        'tokenize --caption-key') words='' paths= ;;
        'tokenize --image-root') words='' paths=folders ;;
        'tokenize --bits') words='' paths= ;;
        'tokenize --reconstruct') words='' paths= ;;
        'tokenize --verify') words='' paths=files ;;
        'tokenize --shard') words='' paths= ;;
        'tokenize --batch-size') words='' paths= ;;
        'tokenize --workers') words='' paths= ;;
        'tokenize --device') words='auto cpu cuda mps' paths= ;;
        'tokenize --dtype') words='auto fp32 bf16 fp16' paths= ;;
        'train --data') words='' paths=files ;;
        'train --out') words='' paths=folders ;;
        'train --preset') words='16bit 32bit 64bit demo infinity-2b infinity-8b infinity-8b-512 layer16 layer24 layer32 layer40 layer48' paths= ;;
        'train --stage') words='tokenizer transformer' paths= ;;
        'train --init') words='demo infinity-2b infinity-8b infinity-8b-512 infinity-vae-d16 infinity-vae-d24 infinity-vae-d32 infinity-vae-d64' paths=files ;;
        'train --aspect') words='' paths= ;;
        'train --caption-key') words='' paths= ;;
        'train --image-root') words='' paths=folders ;;
        'train --config') words='' paths=files ;;
        'train --set') words='' paths= ;;
        'train --steps') words='' paths= ;;
        'train --batch-size') words='' paths= ;;
        'train --seed') words='' paths= ;;
        'train --allow-init-mismatch') words='' paths= ;;
        'train --log') words='tensorboard wandb' paths= ;;
        'train --sweep') words='print run' paths= ;;
        'train --device') words='auto cpu cuda mps' paths= ;;
        'train --devices') words='' paths= ;;
        'train --strategy') words='ddp fsdp' paths= ;;
        'finetune-subject --class') words='' paths= ;;
        'finetune-subject --token') words='' paths= ;;
        'finetune-subject --name') words='' paths= ;;
        'finetune-subject --model') words='demo infinity-2b infinity-8b infinity-8b-512 infinity-vae-d16 infinity-vae-d24 infinity-vae-d32 infinity-vae-d64' paths=files ;;
        'finetune-subject --out') words='' paths=folders ;;
        'finetune-subject --train') words='token text cross ffn self lora all' paths= ;;
        'finetune-subject --prior') words='images distill none' paths= ;;
        'finetune-subject --prior-weight') words='' paths= ;;
        'finetune-subject --priors') words='' paths=folders ;;
        'finetune-subject --resolution') words='0.06M 0.25M 0.60M 1M' paths= ;;
        'finetune-subject --preset') words='16bit 32bit 64bit demo infinity-2b infinity-8b infinity-8b-512 layer16 layer24 layer32 layer40 layer48' paths= ;;
        'finetune-subject --config') words='' paths=files ;;
        'finetune-subject --set') words='' paths= ;;
        'finetune-subject --steps') words='' paths= ;;
        'finetune-subject --seed') words='' paths= ;;
        'finetune-subject --merge') words='' paths=folders ;;
        'finetune-subject --subject') words='' paths=files ;;
        'finetune-subject --log') words='tensorboard wandb' paths= ;;
        'finetune-subject --sweep') words='print run' paths= ;;
        'finetune-subject --device') words='auto cpu cuda mps' paths= ;;
        'gen-priors --class') words='' paths= ;;
        'gen-priors --count') words='' paths= ;;
        'gen-priors --model') words='demo infinity-2b infinity-8b infinity-8b-512 infinity-vae-d16 infinity-vae-d24 infinity-vae-d32 infinity-vae-d64' paths=files ;;
        'gen-priors --template') words='' paths= ;;
        'gen-priors --seed') words='' paths= ;;
        'gen-priors --output'|'gen-priors -o') words='' paths=folders ;;
        'gen-priors --batch-size') words='' paths= ;;
        'gen-priors --device') words='auto cpu cuda mps' paths= ;;
        'gen-priors --dtype') words='auto fp32 bf16 fp16' paths= ;;
        'gen-priors --set') words='' paths= ;;
        'resume --steps') words='' paths= ;;
        'resume --log') words='tensorboard wandb' paths= ;;
        'resume --device') words='auto cpu cuda mps' paths= ;;
        'resume --devices') words='' paths= ;;
        'resume --strategy') words='ddp fsdp' paths= ;;
        'inspect-config --config') words='' paths=files ;;
        'inspect-config --set') words='' paths= ;;
        'inspect-config --plot') words='' paths=files ;;
        *)
            case $command in
                '') words='sample tokenize train finetune-subject gen-priors resume inspect-config' options='--version --help -h' ;;
                sample) words='' paths= options='--model --num-images -n --prompts --recipe --from --seed --mask --keep-scales --cfg --cfg-layer --tau --target-confidence --top-k --top-p --fast --refine --greedy --negative-prompt --aspect --resolution --bits --subject --output -o --overwrite --grid --save-scales --no-metadata --embed-bits --preview --no-preview --json --batch-size --device --dtype --offload --compile --text-dtype --no-text-cache --offline --set --help -h' ;;
                tokenize) words='' paths=files options='--model --resolution --aspect --caption-key --image-root --bits --latents --no-latents --reconstruct --text-features --verify --json --shard --batch-size --workers --device --dtype --offline --help -h' ;;
                train) words='' paths= options='--data --out --preset --stage --init --aspect --caption-key --image-root --config --set --steps --batch-size --seed --allow-init-mismatch --log --dry-run --overfit-check --sweep --device --offline --devices --strategy --json --help -h' ;;
                finetune-subject) words='' paths=folders options='--class --token --name --model --out --train --prior --prior-weight --priors --flip --no-flip --resolution --preset --config --set --steps --seed --overwrite --merge --subject --log --dry-run --sweep --device --offline --json --help -h' ;;
                gen-priors) words='' paths= options='--class --count --model --template --seed --output -o --json --batch-size --device --dtype --no-text-cache --offline --set --help -h' ;;
                resume) words='' paths=folders options='--steps --log --device --offline --devices --strategy --json --help -h' ;;
                inspect-config) words='16bit 32bit 64bit demo infinity-2b infinity-8b infinity-8b-512 layer16 layer24 layer32 layer40 layer48' paths=files options='--config --set --schema --plot --json --help -h' ;;
            esac
            # options where one is begun, or where nothing else can stand
            if [[ $current == -* || -z "$words$paths" ]]; then
                words=$options paths=
            fi
            ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    IFS=$'\n'
    case $paths in
        files) COMPREPLY+=($(compgen -f -- "$current")) ;;
        folders) COMPREPLY+=($(compgen -d -- "$current")) ;;
    esac
}

complete -o filenames -F _bitgen bitgen
