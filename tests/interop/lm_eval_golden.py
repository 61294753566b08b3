"""Writes tests/golden/lm_eval.json: what lm-evaluation-harness's own Hugging Face backend answers.

`python -m tests.interop.lm_eval_golden`, with lm_eval 0.4.13, transformers 5.23, accelerate and torch 2.13 (float32).
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from research.data.tokenizer import BOS, EOS, _bytes

GOLDEN = Path(__file__).parent.parent / "golden"
CONTEXTS = ("", "A man is sitting on a roof. he", "trailing spaces  ", "\n", "Übergrößenträger – naïve café",
            "a context that is longer than the model's 128 positions: " + "0123456789 " * 20)
CONTINUATIONS = (" starts pulling up roofing.", "x", " ends in a space ", "größer")
TEXTS = ("x", "A short text.", "Ein größerer Text – naïve café. " * 4, "one more " * 40, "y" * 127, "y" * 128,
         "y" * 129)


def answers(name: str, beginning: bool) -> dict:
    """Requests and answers of a golden checkpoint, with a tokenizer of bytes that puts BOS first, or does not."""
    definition = Tokenizer.from_str(_bytes())
    if beginning:
        definition.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, definition.token_to_id(BOS))])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(definition.to_str())
        file.flush()
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file.name, bos_token=BOS, eos_token=EOS)
    model = HFLM(pretrained=str(GOLDEN / name), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=4)

    def ask(method, arguments):
        return getattr(model, method)([SimpleNamespace(args=one) for one in arguments], disable_tqdm=True)

    first = [(context, {"until": [], "max_gen_toks": 20}) for context in CONTEXTS[1:]]
    written = ask("generate_until", first)
    # an end that comes in the middle, and one of two that comes first
    ends = [(context, {"until": [end for end in (text[4:6], text[9:11]) if end], "max_gen_toks": 20,
                       "do_sample": False}) for (context, _), text in zip(first, written, strict=True)]
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS
             if not (context == "\n" and not beginning)]  # whose tokens without spaces are none: it fails on that
    pairs += [(context, text) for (context, _), text in zip(first, written, strict=True)
              if context == context.rstrip() and "\ufffd" not in text]
    generations = [*first, *ends]
    return {
        "checkpoint": name, "beginning": beginning,
        "loglikelihood": [[*pair, *answer] for pair, answer in zip(pairs, ask("loglikelihood", pairs), strict=True)],
        "loglikelihood_rolling": [[text, answer] for text, answer in zip(
            TEXTS, ask("loglikelihood_rolling", [(text,) for text in TEXTS]), strict=True)],
        "generate_until": [[*one, text] for one, text in zip(
            generations, ask("generate_until", generations), strict=True)],
    }


if __name__ == "__main__":
    cases = [answers("qwen2_tiny", True), answers("deepseek_v3_tiny", False)]
    (GOLDEN / "lm_eval.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
