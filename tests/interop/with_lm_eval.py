"""The model in the real lm-evaluation-harness, on small local tasks: `make eval-test` (requirements-eval.txt)."""

import json
import re
import shutil

import lm_eval
import pytest
from lm_eval.api.registry import get_model

from research import harness
from research.data.tokenizer import Tokenizer, _bytes
from research.interop.lm_eval import ParsimonyLM
from tests.commands import exit_code
from tests.interop.test_evaluator import GOLDEN

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: endings
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
QUESTIONS = """
task: tiny_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: generate_until
test_split: test
fewshot_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""
TEXTS = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a checkpoint, a folder of tasks)."""
    made = tmp_path_factory.mktemp("harness")
    shutil.copytree(GOLDEN / "qwen2_tiny", made / "checkpoint")
    Tokenizer(_bytes()).save(made / "checkpoint" / "tokenizer.json")
    tasks = made / "tasks"
    tasks.mkdir()
    for name, text in (("choices", CHOICES), ("questions", QUESTIONS), ("texts", TEXTS)):
        (tasks / f"{name}.yaml").write_text(text.format(folder=made))
    rows = [{"ctx": f"There were {n} of them, and", "label": n % 2, "endings": [" they left.", " they all stayed."]}
            for n in range(6)]
    (made / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(5)]
    (made / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made / "checkpoint", tasks


def call(capsys, *words, code=0):
    assert exit_code(harness, *words) == code
    said = capsys.readouterr()
    return said.out, said.err


def test_three_kinds_of_tasks_through_the_command(folders, capsys, tmp_path):
    checkpoint, tasks = folders
    output = tmp_path / "results.json"
    table, _ = call(capsys, f"--checkpoint={checkpoint}", "--tasks=tiny_choices,tiny_questions,tiny_texts", "--samples",
                    f"--include_path={tasks}", f"--output={output}", "--batch_size=4", "--limit=3", "--num_fewshot=1")
    assert all(re.search(rf"\|{name} *\|", table) for name in ("tiny_choices", "tiny_questions", "tiny_texts"))
    results = json.loads(output.read_text())
    assert results["config"]["model_args"] == {"checkpoint": str(checkpoint), "max_length": 128, "recipe": "float32"}
    samples = results["samples"]
    assert {name: len(rows) for name, rows in samples.items()} == dict.fromkeys(samples, 3)
    evaluator = ParsimonyLM(str(checkpoint), 4).evaluator
    for row in samples["tiny_choices"]:
        found = evaluator.loglikelihood(row["arguments"])
        assert [float(answer[0][0]) for answer in row["resps"]] == pytest.approx([sum_ for sum_, _ in found], abs=1e-4)
        label = max(range(2), key=lambda n: found[n][0])
        assert row["acc"] == float(label == row["doc"]["label"])
    for row in samples["tiny_questions"]:
        assert row["arguments"][0][0].count("Question:") == 2
        assert row["resps"][0] == evaluator.generate_until(row["arguments"])


def test_questions_go_through_the_chat_template(folders, capsys, tmp_path):
    """Examples are earlier turns, markers are tokens, and no token comes before the template's own."""
    checkpoint, tasks = folders
    words = (f"--checkpoint={checkpoint}", "--tasks=tiny_questions", f"--include_path={tasks}", "--limit=2",
             "--samples", f"--output={tmp_path}/results.json", "--num_fewshot=1", "--chat", "--system=Be kind.")
    assert "the checkpoint has no chat template" in call(capsys, *words, code=2)[1]
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}"
                        "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}")
    try:
        call(capsys, *words)
        model = ParsimonyLM(str(checkpoint), 4, chat=True)
    finally:
        template.unlink()
    rows = json.loads((tmp_path / "results.json").read_text())["samples"]["tiny_questions"]
    tokenizer = model.evaluator.tokenizer
    bos, eos = tokenizer.special_tokens["bos_token"], tokenizer.special_tokens["eos_token"]
    for row in rows:
        context = row["arguments"][0][0]
        assert context.startswith(f"{bos}<s>Be kind.{eos}<u>Question: What is") and context.endswith(f"{eos}<a>")
        assert [context.count(mark) for mark in ("<u>", "<a>", eos)] == [2, 2, 4]
        ids = model.evaluator._encode(context)
        assert ids[0] == tokenizer.bos_id and ids[1] != tokenizer.bos_id and ids.count(tokenizer.eos_id) == 4
        assert row["resps"][0] == model.evaluator.generate_until(row["arguments"])


def test_the_harness_finds_the_model_by_its_name_and_keeps_its_answers(folders, tmp_path):
    checkpoint, tasks = folders
    assert get_model("parsimony") is ParsimonyLM
    results = [lm_eval.simple_evaluate(
        "parsimony", {"checkpoint": str(checkpoint)}, tasks=[str(tasks / "choices.yaml")], batch_size=4,
        bootstrap_iters=0, use_cache=str(tmp_path / "answers"))["results"]["tiny_choices"] for _ in range(2)]
    assert results[0] == results[1] and list(tmp_path.glob("answers*.db"))


@pytest.mark.parametrize("words, pattern", [
    (["--tasks=hellaswagg"], r"--tasks: 'hellaswagg' is no task of the harness \(did you mean hellaswag\?\)"),
    (["--tasks=/does/not/exist.yaml"], "--tasks: '/does/not/exist.yaml' does not exist"),
    (["--tasks={tasks}/broken.yaml"], "--tasks: .*broken.yaml"),
    (["--tasks={tasks}/no_data.yaml"], "--tasks: .*no_data.yaml cannot be loaded: .*"),
    (["--tasks={tasks}/choices.yaml", "--max_length=129"], "--max_length=129 must be from 1 to max_position_embedd"),
    (["--tasks={tasks}/choices.yaml", "--checkpoint=/does/not/exist"], "--checkpoint='/does/not/exist' does not exist"),
])
def test_wrong_requests_are_one_line(folders, words, pattern, capsys):
    checkpoint, tasks = folders
    (tasks / "broken.yaml").write_text("task: [")
    (tasks / "no_data.yaml").write_text(CHOICES.format(folder="/does/not/exist"))
    words = [f"--checkpoint={checkpoint}", *(word.format(tasks=tasks) for word in words)]
    try:
        said = call(capsys, *words, code=2)[1]
    finally:
        for name in ("broken", "no_data"):
            (tasks / f"{name}.yaml").unlink()
    assert re.match(f"error: {pattern}", said.splitlines()[-1])
