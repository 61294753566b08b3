"""Exported folders in transformers: their logits and greedy tokens are those of the folders they came from. And chat
templates: the ids of ours are those of theirs.

    python -m tests.interop.parity [--peer_python=PATH]     (`make parity` first)

Every golden folder becomes a workdir and a folder again, FP8 blocks dequantised (transformers reads them with
accelerate only); a folder that a random model of ours, with two multi-token modules, was exported to has no golden
logits: ours are compared. Prints a line for each and exits with 1 where one differs by more than 1e-4.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from absl import flags, logging

from research import bench, command
from research.data.chat import prompt_ids, rendered
from research.data.tokenizer import Tokenizer
from research.errors import RequestError, RunError
from research.interop.exporter import export_workdir
from research.interop.importer import import_folder
from research.interop.scoring import logits
from research.interop.weights import read_weights
from tests.data.test_chat import MARKED, SPECIALS, TEMPLATE
from tests.data.test_tokenizer import foreign
from tests.interop.test_huggingface import FOLDERS, GOLDEN
from tests.interop.test_score import workdir

FLAGS = flags.FlagValues()
_PEER = flags.DEFINE_string("peer_python", None, "Python with torch and transformers (.venv-parity's).", FLAGS)
ALLOWED = 1e-4
PEER = """
import json, sys, numpy, torch, transformers
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, output_loading_info=True)
golden = numpy.load(sys.argv[2])
with torch.no_grad():
    found = {"logits": model.eval()(torch.from_numpy(golden["input_ids"])).logits.numpy()}
    if "greedy" in golden:
        found["greedy"] = model.generate(torch.from_numpy(golden["greedy"][:, :16]), max_new_tokens=24,
                                         min_new_tokens=24, do_sample=False).numpy()
numpy.savez(sys.argv[3], **found)
print(json.dumps({"missing": len(info["missing_keys"]), "mismatched": len(info["mismatched_keys"])}))
"""
TEMPLATES = {
    "by lines": TEMPLATE,
    "with marked answers": MARKED,
    "by expressions": "{% set ns = namespace(said='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
                      "{% set ns.said = m['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.said}}"
                      "{%- for m in messages if m.role != 'system' -%} {{'<|user|>' + m.content.split('>')[-1]}}"
                      "{% if m.role == 'assistant' %}{{eos_token}}{% break %}{% endif %}{%- endfor -%}"
                      "{% if tools is not none or undefined is defined %}{{ tools }}{% endif %}{{ strftime_now('%Y') }}"
                      "{{ {'<é': [1, none]} | tojson(indent=2) }}{% if add_generation_prompt %}<|answer|>{% endif %}\n",
}
CONVERSATIONS = (
    [{"role": "user", "content": "hi  there\n"}],
    [{"role": "system", "content": " Be é.\n"}, {"role": "user", "content": "1 < 2 & </s> x"},
     {"role": "assistant", "content": "so</think>\n yes"}, {"role": "user", "content": ""}],
)
CHATS = """
import json, sys, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([[tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False),
                   tokenizer.apply_chat_template(one, tokenize=False)] for one in json.loads(sys.argv[2])]))
"""


def main() -> None:
    peer = bench.find_peer(_PEER.value)
    if peer is None:
        raise RequestError("the peer's environment is missing: `make parity` makes it")
    logging.set_verbosity(logging.ERROR)  # that no golden folder has a tokenizer is known
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        for name in FOLDERS:
            import_folder(GOLDEN / name, base / name, None, None)
            export_workdir(base / name, base / f"{name}_again", "none", None)
            wrong += compare(peer, name, base / f"{name}_again", GOLDEN / name / "golden.npz")
        run = workdir(base / "run")
        export_workdir(run, base / "released", None, None)
        input_ids = np.random.default_rng(0).integers(0, 96, (2, 32))
        np.savez(base / "ours.npz", input_ids=input_ids, logits=logits(*read_weights(run), input_ids)["logits"])
        wrong += compare(peer, "a random model of ours", base / "released", base / "ours.npz")
        for name, template in TEMPLATES.items():
            wrong += compare_chats(peer, f"a chat template {name}", base / name, template)
    if wrong:
        raise RunError(f"{', '.join(wrong)}: not what transformers computes")


def compare(peer: str, name: str, folder: Path, golden: Path) -> list[str]:
    """Prints how far transformers is from the golden file; [name] where that is too far."""
    output = folder / "peer.npz"
    done = subprocess.run([peer, "-c", PEER, str(folder), str(golden), str(output)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{name}: transformers fails: {(done.stderr or ' ').splitlines()[-1]}")
    info, found, expected = json.loads(done.stdout.splitlines()[-1]), np.load(output), np.load(golden)
    error = float(np.abs(found["logits"] - expected["logits"]).max())
    same = "greedy" not in expected or np.array_equal(found["greedy"], expected["greedy"])
    print(f"{name}: largest difference of logits {error:.1e}"
          + (", greedy tokens " + ("the same" if same else "differ") if "greedy" in expected else ""))
    return [name] if error > ALLOWED or not same or any(info.values()) else []


def compare_chats(peer: str, name: str, folder: Path, template: str) -> list[str]:
    """Prints whether ids and text of conversations are those of transformers; [name] where they are not."""
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = Tokenizer.load(foreign(folder, SPECIALS, ["<|answer|>"], config))
    done = subprocess.run([peer, "-c", CHATS, str(folder), json.dumps(CONVERSATIONS)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{name}: transformers fails: {(done.stderr or ' ').splitlines()[-1]}")
    ours = [[prompt_ids(tokenizer, one), rendered(tokenizer, one, open_answer=False)] for one in CONVERSATIONS]
    same = ours == json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: ids and text of {len(ours)} conversations {'the same' if same else 'differ'}")
    return [] if same else [name]


if __name__ == "__main__":
    command.run(main, FLAGS)
