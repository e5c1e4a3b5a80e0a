#!/usr/bin/env bash
# bitgen in a pipeline, as a CI job would: every failure of a command in it is one of the script.
#     pipeline.sh PYTHON      in an empty folder
set -euo pipefail
python=$1
bitgen() { "$python" -m bitgen_cli "$@"; }

# one picture through a pipe, which carries its recipe
bitgen sample "a blue car" --seed 3 --output - 2> said.txt > piped.png
[ "$(head -c 4 piped.png | tail -c 3)" = PNG ]
[ "$(cat said.txt)" = "seed 3" ]

# the same again from itself, to the last bit
[ "$(bitgen sample --recipe piped.png --output again.png)" = again.png ]
cmp piped.png again.png

# prompts from a program; a bad line is told, and does not stop the others
code=0
printf 'a red dog\n{"prompt": 3}\na cat on the beach\n' \
    | bitgen sample --prompts - --seed 1 --output out/ 2> said.txt > names.txt || code=$?
[ "$code" = 4 ]
grep -q "line 2: prompt cannot be '3'" said.txt
[ "$(sort names.txt | tr '\n' ' ')" = "out/a-cat-on-the-beach-1.png out/a-red-dog-1.png " ]
[ "$(wc -l < out/manifest.jsonl)" -eq 2 ]

# a job that is ended leaves whole pictures, and goes on
for n in $(seq 200); do echo "a red dog, number $n"; done > many.txt
"$python" -m bitgen_cli sample --prompts many.txt --output many/ --batch-size 1 > names.txt 2> said.txt &
job=$!
for _ in $(seq 1200); do [ -s names.txt ] && break; sleep 0.05; done
kill -TERM $job
code=0
wait $job || code=$?
[ "$code" = 143 ]
grep -q "interrupted: stopped after .* of 200 pictures (the same command goes on)" said.txt
[ "$(grep -vc "^drawing: " said.txt)" -eq 1 ]
"$python" - <<'PYTHON'
import json, pathlib
from PIL import Image
files = sorted(pathlib.Path("many").iterdir())
listed = {json.loads(line)["file"] for line in open("many/manifest.jsonl")}
assert files and {file.name for file in files} <= listed | {"manifest.jsonl"}, files
for file in files:
    if file.suffix == ".png":
        Image.open(file).load()
PYTHON
echo well
