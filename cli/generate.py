"""``fewbits generate``: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fewbits.cli.common import DeviceOption, DtypeOption, ModelArgument, ThreadsOption, examples, report_to, say
from fewbits.quant.errors import FewbitsError

EPILOG = examples(
    'fewbits generate ./model-w4 "The capital of France is" --max-new-tokens 20',
    'fewbits generate ./model-w4 "Name three rivers." --chat',
    "fewbits generate ./model-w4 - < prompt.txt",
)

DEFAULT_NEW_TOKENS = 64


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="At most N new tokens; default 64.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send PROMPT as a user's message in the model's chat format.")
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt, greedily; prompt and continuation go to standard output."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise FewbitsError("PROMPT: is empty; give some text to continue")
    with report_to(None):  # standard output is for the text alone
        from fewbits.eval.models import open_model, thread_count

        with thread_count(threads):
            loaded = open_model(model, device=device, dtype=dtype)
            continuation, summary = _continue(loaded, text, max_new_tokens, chat)
    typer.echo(f"{text}\n\n{continuation}" if chat else text + continuation)
    say(summary)


def _encode(loaded: Any, text: str, chat: bool) -> Any:
    """The prompt as the model's inputs, ``input_ids (1, T)`` and its mask."""
    tokenizer = loaded.need_tokenizer()
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise FewbitsError(f"--chat: the tokenizer of {loaded.name} has no chat template; leave --chat out")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _room(loaded: Any, prompt_tokens: int, max_new_tokens: int | None) -> int:
    """New tokens to make: 64 unless the user says, within the model's context."""
    from fewbits.eval.text import context_length

    most = context_length(loaded.model)
    left = most - prompt_tokens if most is not None else DEFAULT_NEW_TOKENS
    if left < (max_new_tokens or 1) and most is not None:
        raise FewbitsError(f"--max-new-tokens {max_new_tokens or DEFAULT_NEW_TOKENS}: with {prompt_tokens} tokens of "
                           f"prompt this exceeds the model's context of {most}; shorten either")
    return max_new_tokens or min(DEFAULT_NEW_TOKENS, left)


def _continue(loaded: Any, text: str, max_new_tokens: int | None, chat: bool) -> tuple[str, str]:
    """The continuation of ``text`` and a line about how fast it came."""
    import time

    import torch

    tokenizer = loaded.need_tokenizer()
    inputs = _encode(loaded, text, chat)
    ids = inputs["input_ids"]
    room = _room(loaded, ids.shape[1], max_new_tokens)
    start = time.perf_counter()
    with torch.inference_mode():
        out = loaded.model.generate(
            **inputs.to(loaded.model.device), max_new_tokens=room, do_sample=False,
            temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[0]
    seconds = time.perf_counter() - start
    new = len(out) - ids.shape[1]
    # decoding the new tokens alone would lose the space before the first of them in some tokenizers
    before, whole = (tokenizer.decode(t, skip_special_tokens=True) for t in (ids[0], out))
    continuation = whole[len(before):] if whole.startswith(before) else tokenizer.decode(out[ids.shape[1]:])
    return continuation.lstrip("\n") if chat else continuation, f"{new} tokens in {seconds:.1f} s"
