"""Wrong requests: each is answered by one line that names what is wrong, exit code 2, and an untouched disk."""

import fcntl
import gzip
import json
import logging
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from absl import flags as flags_module
from absl import logging as absl_logging

from research import command, main
from research.training import loop
from tests.commands import exit_code
from tests.training import runs

SMOKE = "--config=experiments/nano.py:smoke"
TEXTS = [f"Text number {n} of a corpus: " + " ".join(str(n * k) for k in range(n % 13)) for n in range(120)]


def field(assignment: str, pattern: str, *more: str):
    """A row of the table: one field of the smoke experiment, and what the answer says after `config.`."""
    flags = [SMOKE, "--workdir={new}", f"--config.{assignment}", *(f"--config.{other}" for other in more)]
    return pytest.param(flags, r"config\." + pattern, id=assignment[:60])


def files(name: str, pattern: str, *more: str):
    """A row: a corpus file or glob of the fixture."""
    return field(f"data.files={{data}}/{name}", pattern, "data.source=files", *more)


def flags(pattern: str, *words: str):
    """A row: the whole command line."""
    return pytest.param(list(words), pattern, id=" ".join(words)[-60:] or "nothing")


WRONG = [
    # flags
    flags("--workdir is required: "),
    flags("--workdir is required: ", SMOKE),
    flags("--workdir is required: ", SMOKE, "--workdir="),
    flags("--workdir has no value", SMOKE, "--workdir"),
    flags("--workdir has no value", SMOKE, "--workdir", "--mode=eval"),
    flags("--config is required: ", "--workdir={new}"),
    flags("--config is required: ", "--workdir={new}", "--config.training.steps=3"),
    flags("--config has no value", "--workdir={new}", "--config"),
    flags(r"--confg is not a flag \(did you mean --config\?\)", "--confg=experiments/nano.py", "--workdir={new}"),
    flags(r"--work_dir is not a flag \(did you mean --workdir\?\)", SMOKE, "--work_dir={new}"),
    flags(r"--training.steps is not a flag \(did you mean --config.training.steps\?\)", SMOKE, "--training.steps=5"),
    flags(r"--steps is not a flag \(did you mean --config.training.steps\?\)", SMOKE, "--steps=5"),
    flags(r"flag --num_processes=two: must be a whole number$", SMOKE, "--workdir={new}", "--num_processes=two"),
    flags("--profile traces steps of training", "--mode=eval", "--workdir={run}", "--profile"),
    flags("--verbosity is not a flag", SMOKE, "--workdir={new}", "--verbosity=1"),
    flags("--noconfig.model.norm_topk_prob is not a flag", SMOKE, "--workdir={new}", "--noconfig.model.norm_topk_prob"),
    flags("--config.model.norm_topk_prob has no value", SMOKE, "--workdir={new}", "--config.model.norm_topk_prob"),
    flags("--config.training.steps has no value", SMOKE, "--workdir={new}", "--config.training.steps", "7"),
    flags("'eval' is not a flag: ", SMOKE, "--workdir={new}", "eval"),
    flags("'false' is not a flag: ", SMOKE, "--workdir={new}", "--profile", "false"),
    flags("flag --mode=foo: value should be one of <train.eval>", SMOKE, "--workdir={new}", "--mode=foo"),
    flags("flag --profile=3: Non-boolean argument", SMOKE, "--workdir={new}", "--profile=3"),
    flags("Unable to open flagfile: .*'{new}'", SMOKE, "--flagfile={new}"),
    # experiments
    flags(r"--config={data}/nan.py does not exist", "--config={data}/nan.py", "--workdir={new}"),
    flags(r"--config=experiments/nan.py does not exist \(did you mean experiments/nano.py\?\)",
          "--config=experiments/nan.py", "--workdir={new}"),
    *(flags(rf"--config={name} does not exist \(did you mean experiments/nano.py\?\)", f"--config={name}",
            "--workdir={new}") for name in ("nano", "nano.py")),
    flags("--config=experiments is a directory: ", "--config=experiments", "--workdir={new}"),
    flags(r"--config=experiments/nano.py:smok has no arm 'smok' \(did you mean smoke\?\)",
          "--config=experiments/nano.py:smok", "--workdir={new}"),
    flags("--config={data}/syntax.py fails in line 2: SyntaxError: ", "--config={data}/syntax.py", "--workdir={new}"),
    flags("--config={data}/raises.py fails in line 4: ZeroDivisionError: ", "--config={data}/raises.py",
          "--workdir={new}"),
    flags("--config={data}/imports.py fails in line 1: ModuleNotFoundError: ", "--config={data}/imports.py",
          "--workdir={new}"),
    flags("--config={data}/binary.py fails", "--config={data}/binary.py", "--workdir={new}"),
    flags("--config={data}/empty.py has no function get_config", "--config={data}/empty.py", "--workdir={new}"),
    flags("--config={data}/number.py get_config returns a int, not a ConfigDict", "--config={data}/number.py",
          "--workdir={new}"),
    flags("--config={data}/number.py:arm has no arms, so no 'arm'", "--config={data}/number.py:arm", "--workdir={new}"),
    flags("config.model.colour=3 is not a field", "--config={data}/extra.py", "--workdir={new}"),
    flags("config.training is missing|config.training.steps is missing", "--config={data}/lacking.py",
          "--workdir={new}"),
    flags("config.training.steps is missing in the experiment's config", "--config={data}/lacking.py",
          "--workdir={new}", "--config.training.steps=3"),
    # fields
    field("model.n_expert=3", r"model\.n_expert=3 is not a field .*did you mean config\.model\.n_routed_experts\?\)"),
    field("=3", r"=3 is not a field"),
    field("training.steps.x=3", r"training\.steps\.x=3 is not a field"),
    field("model=3", r"model=3 must be a group of fields: "),
    field("model.rope_scaling=yarn", r"model\.rope_scaling='yarn' must be a group of fields: "),
    field("rope.type=yarn", r"rope\.type='yarn' is not a field .*config\.model\.rope_scaling\.type"),
    field("training.steps=abc", r"training\.steps='abc' must be a whole number"),
    field("training.steps=1.5", r"training\.steps=1\.5 must be a whole number"),
    field("training.steps=", r"training\.steps='' must be a whole number"),
    field("training.steps=0", r"training\.steps=0 must be at least 1"),
    field("training.steps=99999999999", r"training\.steps=99999999999 must be at most 2147483647"),
    field("model.q_lora_rank=none", r"model\.q_lora_rank='none' must be a whole number, or None"),
    field("model.norm_topk_prob=maybe", r"model\.norm_topk_prob='maybe' must be true or false"),
    field("optimizer.learning_rate=fast", r"optimizer\.learning_rate='fast' must be a number"),
    field("optimizer.learning_rate=nan", r"optimizer\.learning_rate=nan must be finite"),
    field("optimizer.learning_rate=-1", r"optimizer\.learning_rate=-1\.0 must be above 0"),
    field("optimizer.beta2=1", r"optimizer\.beta2=1\.0 must be at least 0 and below 1"),
    field("optimizer.name=adam", r"optimizer\.name='adam' must be one of adamw, muon \(did you mean adamw\?\)"),
    field("precision.recipe=fp7", r"precision\.recipe='fp7' must be one of float32, "),
    field("precision.implementation=mosaic",
          r"precision\.implementation='mosaic' cannot run: .*: the default device is a cpu, not a GPU",
          "precision.recipe=fp8_deepseek"),
    field("model.attention_implementation=cudnn", r"model\.attention_implementation='cudnn' masks no documents: "),
    field("data.mask_documents=False", r"model\.attention_implementation='cudnn' cannot run: .* device is a cpu",
          "model.attention_implementation=cudnn"),
    field("model.attention=mha", r"model\.attention='mha' must be one of mla, gqa"),
    field("model.n_group=3", r"model\.n_group=3 does not divide config\.model\.n_routed_experts=16"),
    field("model.topk_group=5", r"model\.topk_group=5 must be at most config\.model\.n_group=4", "model.n_group=4"),
    field("model.topk_group=1", r"model\.topk_group=1 is too small: 1 groups of 2 experts hold fewer than "
          r"config\.model\.num_experts_per_tok=4", "model.n_group=8"),
    field("model.num_experts_per_tok=17", r"model\.num_experts_per_tok=17 must be at most .*n_routed_experts=16"),
    field("model.first_k_dense_replace=9", r"model\.first_k_dense_replace=9 must be at most .*num_hidden_layers=3"),
    field("model.qk_rope_head_dim=7", r"model\.qk_rope_head_dim=7 must be even"),
    field("model.head_dim=7", r"model\.head_dim=7 must be even", "model.attention=gqa"),
    field("model.num_key_value_heads=3", r"model\.num_key_value_heads=3 does not divide .*num_attention_heads=4",
          "model.attention=gqa"),
    field("model.rope_scaling.beta_fast=1", r"model\.rope_scaling\.beta_fast=1\.0 must be above .*beta_slow=1\.0",
          "model.rope_scaling.type=yarn"),
    field("model.rope_scaling.high_freq_factor=1", r"model\.rope_scaling\.high_freq_factor=1\.0 must be above ",
          "model.rope_scaling.type=llama3"),
    field("training.accumulation_steps=3", r"training\.accumulation_steps=3 does not divide .*batch_size=8"),
    field("training.accumulation_steps=2", r"training\.accumulation_steps=2 must be 1 with .*balance_loss='batch'",
          "model.balance_loss=batch"),
    field("training.batch_ramp_start=9", r"training\.batch_ramp_start=9 must be .* at most .*batch_size=8"),
    field("training.batch_ramp_start=3", r"training\.batch_ramp_start=3 must be a multiple of .*=2",
          "training.accumulation_steps=2"),
    field("data.sequence_length=5000", r"data\.sequence_length=5000 must be at most .*max_position_embeddings=4096"),
    field("mtp.num_nextn_predict_layers=64", r"mtp\.num_nextn_predict_layers=64 must be below .*sequence_length=64"),
    field("optimizer.plateau_until=0.05", r"optimizer\.plateau_until=0\.05 must be at least .*warmup_fraction=0\.1"),
    *(field(f"mesh.{axis}=2", rf"mesh\.{axis}=2 needs 2 devices: 1 cpu device is present")
      for axis in ("data", "fsdp", "expert", "tensor")),
    field("mesh.pipeline=2", r"training\.accumulation_steps=1 must be at least config\.mesh\.pipeline=2: the pieces"),
    field("mesh.pipeline=3", r"mesh\.pipeline=3 does not divide the 2 layers with experts; the first stage has"),
    field("mesh.pipeline=4", r"mesh\.pipeline=4 needs 4 devices: 1 cpu device is", "training.accumulation_steps=4",
          "model.num_hidden_layers=5"),
    field("training.pipeline_schedule=zero_bubble", r"training\.pipeline_schedule='zero_bubble' must be '1f1b' with "),
    field("mesh.data=3", r"training\.batch_size=8 must be a multiple of 3 = mesh\.data \* mesh\.fsdp \* mesh\.expert"),
    # data
    field("data.source=stdlibs", r"data\.source='stdlibs' must be one of stdlib, .*\(did you mean stdlib\?\)"),
    field("data.source=files", r"data\.files='' must name files"),
    field("data.source=huggingface", r"data\.huggingface_dataset='' must name a dataset"),
    field("data.validation_fraction=0", r"data\.validation_fraction=0\.0 must be above 0"),
    field("data.validation_fraction=1", r"data\.validation_fraction=1\.0 leaves nothing to train on"),
    field("data.validation_fraction=1.5", r"data\.validation_fraction=1\.5 must be between 0 and 1"),
    field("data.validation_fraction=1e-9", r"data\.validation_fraction=1e-09 leaves none of 200 documents"),
    field("data.tokenizer=tiktoken", r"data\.tokenizer='tiktoken' is neither bytes nor bpe, nor a path"),
    field("data.tokenizer={data}/corpus", r"data\.tokenizer='{data}/corpus' cannot be used: .*tokenizer\.json"),
    field("data.tokenizer={data}/wrong.json", r"data\.tokenizer='{data}/wrong\.json' cannot be used: "),
    field("data.bpe_vocab_size=100", r"data\.bpe_vocab_size=100 is too small", "data.tokenizer=bpe"),
    field("data.cache=/dev/null/cache", r"data\.cache='/dev/null/cache' cannot be written: Not a directory"),
    field("model.vocab_size=100", r"model\.vocab_size=100 is smaller than the tokenizer's 262"),
    files("nowhere/*.txt", r"data\.files='{data}/nowhere/\*\.txt' matches no file"),
    files("corpus", r"data\.files='{data}/corpus' is a folder: "),
    files("blank.txt", r"data\.files='{data}/blank\.txt' .*holds no document"),
    files("blank.jsonl", r"data\.files='{data}/blank\.jsonl' .*holds no document"),
    files("*.jsonl", r"data\.files='{data}/\*\.jsonl' {data}/blank\.jsonl holds no document"),
    files("latin1.txt", r"data\.files='{data}/latin1\.txt' .* is not UTF-8: byte 0xe9 at offset 3"),
    files("nameless.jsonl", r"data\.files=.*nameless\.jsonl:2 has no field 'text' \(config\.data\.text_field\)"),
    files("good.jsonl", r"data\.files=.*good\.jsonl:1 has no field 'body' ", "data.text_field=body"),
    files("numeric.jsonl", r"data\.files=.*numeric\.jsonl:1 has a field 'text' that is not text"),
    files("torn.jsonl", r"data\.files=.*torn\.jsonl:2 is not JSON"),
    files("truncated.txt.gz", r"data\.files=.*truncated\.txt\.gz is not an intact gzip file: "),
    files("plain.txt.gz", r"data\.files=.*plain\.txt\.gz is not an intact gzip file: "),
    field("data.files=README.md", r"data\.files='README\.md' is read with .*\.source='files' alone"),
    field("data.text_field=body", r"data\.text_field='body' is read with .*='files' or 'huggingface' alone"),
    field("data.huggingface_dataset=a/b",
          r"data\.huggingface_dataset='a/b' is read with config\.data\.source='huggingface' alone, not 'stdlib'"),
    field("data.huggingface_split=test", r"data\.huggingface_split='test' is read with ", "data.source=files",
          "data.files={data}/good.jsonl"),
    files("corpus/one.txt", r"data\.validation_fraction=0\.001 leaves nothing of a text of \d+ characters for valid",
          "data.validation_fraction=0.001"),
    files("short.jsonl", r"data\.sequence_length=4000 is too long: the training text has ", "data.sequence_length=4000",
          "data.validation_fraction=0.5"),
    # workdirs
    flags("--workdir={data}/blank.txt cannot be written: ", SMOKE, "--workdir={data}/blank.txt"),
    flags("--workdir={data}/blank.txt/run cannot be written: ", SMOKE, "--workdir={data}/blank.txt/run"),
    flags("--workdir={new}/a/b/n+ cannot be written: File name too long", SMOKE, "--workdir={new}/a/b/" + "n" * 300),
    flags("--workdir={used} is in use by another run", SMOKE, "--workdir={used}"),
    flags("{new}/config.json does not exist: {new} is not the workdir of a run", "--mode=eval", "--workdir={new}"),
    flags("--workdir={new} holds no intact checkpoint", "--mode=eval", SMOKE, "--workdir={new}"),
    flags("--workdir={damaged} holds no intact checkpoint", "--mode=eval", "--workdir={damaged}"),
    flags("config.precision.implementation='mosaic' cannot run: ", "--mode=eval", "--workdir={run}",
          "--config.precision.recipe=fp8_tensor", "--config.precision.implementation=mosaic"),
    *(flags(f"{{{name}}}/config.json{pattern}", "--mode=eval", f"--workdir={{{name}}}") for name, pattern in (
        ("torn", " is not JSON: "), ("listed", ": must be a JSON object, not list"),
        ("newer", r": config\.model\.hidden_sise=32 is not a field .*hidden_size"),
        ("older", r": config\.training\.seed is missing"),
        ("odd", r": config\.model\.num_hidden_layers=0 must be at least 1"))),
    flags("{tokenless}/tokenizer.json cannot be read: No such file", "--mode=eval", "--workdir={tokenless}"),
    flags("{mistoken}/tokenizer.json: not a tokenizer.json: ", "--mode=eval",
          "--workdir={mistoken}"),
    # checkpoints
    *(pytest.param(["{micro}", f"--config.{change}"], pattern, id=f"resume {change}") for change, pattern in (
        ("model.hidden_size=40", r"{run}/checkpoints/2 belongs to another model: .*\(1, 32, .* in the checkpoint"),
        ("model.num_hidden_layers=3", r"{run}/checkpoints/2 belongs to another model: "),
        ("training.ema_decay=0", r"{run}/checkpoints/2 belongs to another model: the model lacks ema/"),
        ("optimizer.name=muon", r"{run}/checkpoints/2 belongs to another model: "),
        ("data.max_documents=29", r"the checkpoint was trained on another corpus "),
        ("training.steps=1", r"config\.training\.steps=1 is less than what is done: {run}/checkpoints/2"))),
    field("checkpoint.initialize_from={data}/nowhere",
          r"checkpoint\.initialize_from='{data}/nowhere' cannot be used: .* does not exist"),
    field("checkpoint.initialize_from={data}",
          r"checkpoint\.initialize_from='{data}' cannot be used: .* holds neither "),
    field("checkpoint.initialize_from={damaged}", r"checkpoint\.initialize_from='{damaged}' .*holds no intact"),
    field("checkpoint.initialize_from={run}", r"checkpoint\.initialize_from='{run}' is of another model: "),
    field("checkpoint.initialize_from={pickled}", r"checkpoint\.initialize_from='{pickled}' .*pickle"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """The folders that the table names: what a user may have lying about."""
    root = tmp_path_factory.mktemp("requests")
    data, cache = root / "data", root / "cache"
    (data / "corpus").mkdir(parents=True)
    rows = [json.dumps({"text": text}) for text in TEXTS]
    compressed = gzip.compress(("x" * 50 + "\n".join(TEXTS)).encode())
    for name, content in {
        "corpus/one.txt": TEXTS[7], "blank.txt": " \n", "blank.jsonl": "\n\n", "latin1.txt": "caf\xe9".encode("latin1"),
        "good.jsonl": "\n".join(rows), "nameless.jsonl": rows[0] + '\n{"body": "x"}\n', "plain.txt.gz": "no gzip",
        "numeric.jsonl": '{"text": 3}\n', "torn.jsonl": rows[0] + "\n" + rows[1][:20], "wrong.json": '{"a": 1}',
        "short.jsonl": "\n".join(rows[:20]), "truncated.txt.gz": compressed[: len(compressed) // 2],
        "syntax.py": "def get_config():\n    retrun 3\n", "empty.py": "",
        "number.py": "def get_config():\n    return 3\n",
        "raises.py": "from experiments import base\n\ndef get_config():\n    return 1 / 0\n", "binary.py": b"\0\1\2",
        "imports.py": "import experiments.nonexistent\n",
        "extra.py": "from experiments import base\n\ndef get_config():\n    c = base.get_config()\n    c.unlock()\n"
                    "    c.model.colour = 3\n    return c\n",
        "lacking.py": "from experiments import base\n\ndef get_config():\n    c = base.get_config()\n    c.unlock()\n"
                      "    del c.training.steps\n    return c.lock()\n",
    }.items():
        (data / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    run = root / "run"
    fields = {"training.steps": 2, "evaluation.every_steps": 0, "evaluation.samples": 0, "model.n_routed_experts": 0,
              "mtp.num_nextn_predict_layers": 0}  # dense: it compiles in a moment
    loop.train(runs.settings_of(cache, **fields), run)
    for name in ("damaged", "torn", "listed", "newer", "older", "odd", "tokenless", "mistoken"):
        shutil.copytree(run, root / name)
    for manifest in (root / "damaged").glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    text = (run / "config.json").read_text()
    plain = json.loads(text)
    (root / "torn/config.json").write_text(text[:100])
    (root / "listed/config.json").write_text("[1]")
    (root / "newer/config.json").write_text(text.replace("hidden_size", "hidden_sise"))
    (root / "odd/config.json").write_text(text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 0'))
    del plain["training"]["seed"]
    (root / "older/config.json").write_text(json.dumps(plain))
    (root / "tokenless/tokenizer.json").unlink()
    (root / "mistoken/tokenizer.json").write_text("{")
    (root / "used").mkdir()
    (root / "pickled").mkdir()
    (root / "pickled/pytorch_model.bin").write_bytes(b"\x80\x04.")
    words = runs.arguments(run, cache, **fields)[3:]
    lock = (root / "used/.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield {"root": str(root), "micro": "\n".join(words), **{
        name: str(root / name) for name in (
            "data", "cache", "new", "run", "used", "pickled", "damaged", "torn", "listed", "newer", "older", "odd",
            "tokenless", "mistoken")}}
    lock.close()


@pytest.fixture
def ask(places, capsys, monkeypatch):
    """Runs the command in this process: words with {places} -> (exit code, stdout, stderr)."""
    def call(words):
        argv = [part for word in words for part in fill(word, places).split("\n")]
        if any(word.startswith("--config=") for word in argv) and "--config.data.cache" not in " ".join(argv):
            argv.append(f"--config.data.cache={places['cache']}/data")
        code = exit_code(main, *argv)
        out, err = capsys.readouterr()
        return code, out, err

    handlers, level, verbosity = logging.root.handlers, logging.root.level, absl_logging.get_verbosity()
    monkeypatch.chdir(runs.ROOT)
    command.log_lines()
    yield call
    logging.root.handlers = handlers
    logging.root.setLevel(level)
    absl_logging.set_verbosity(verbosity)


@pytest.mark.parametrize("words, pattern", WRONG)
def test_a_wrong_request(words, pattern, ask, places):
    before = disk(places["root"])
    code, out, err = ask(words)
    said = [line for line in err.splitlines() if not line.startswith("warning: checkpoint {damaged}".format(**places))]
    assert (code, out, len(said)) == (2, "", 1), err
    escaped = {name: re.escape(place) for name, place in places.items()}
    assert re.match(f"error: ({fill(pattern, escaped)})", said[0])
    assert disk(places["root"]) == before


def test_there_are_enough():
    assert len({row.id for row in WRONG}) == len(WRONG) >= 60


def test_a_real_process_answers_in_one_line(places, tmp_path):
    for words, pattern in (
        (["--config=experiments/nano.py:smoke", "--config.model.n_expert=3"], "config.model.n_expert=3 is not a field"),
        (["--config=experiments/nano.py:smoke", "--confg=3"], "--confg is not a flag"),
        (["--config=experiments/nano.py:smoke", "--config.data.source=files", "--config.data.files=/nowhere"],
         "config.data.files='/nowhere' matches no file"),
        ([part for part in places["micro"].split("\n") if "workdir" not in part] + ["--config.model.hidden_size=40"],
         "{run}/checkpoints/2 belongs to another model"),
    ):
        workdir = places["run"] if "{run}" in pattern else tmp_path / "new"
        command = [sys.executable, "-m", "research.main", f"--workdir={workdir}", *words]
        before = disk(places["root"])
        code, out, err = runs.finish(runs.start(command, Path(places["cache"])))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: " + pattern.format(**places))
        assert disk(places["root"]) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help(flag, tmp_path):
    code, out, err = runs.finish(runs.start([sys.executable, "-m", "research.main", flag], tmp_path))
    assert (code, err) == (0, "") and out.startswith(main.__doc__)
    for name in ("config", "workdir", "mode", "profile"):
        assert re.search(rf"--(\[no\])?{name}: ", out)


def test_an_error_of_the_system_is_one_line_too(capsys):
    def fail():
        raise OSError(28, "No space left on device", "/somewhere/file")

    assert command.execute(fail, ["x"], flags_module.FlagValues()) == 1
    assert capsys.readouterr().err == "error: /somewhere/file: No space left on device\n"


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (command.Stopped(143), 143)])
def test_a_stop_before_the_loop(error, code, capsys):
    def stop():
        raise error

    assert command.execute(stop, ["x"], flags_module.FlagValues()) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number, stop", [(signal.SIGTERM, command.Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_stop_is_not_lost_where_python_cannot_raise(number, stop, monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(number)

    def terminate(*_):
        raise command.Stopped(143)

    before = signal.signal(signal.SIGTERM, terminate)
    monkeypatch.setattr(sys, "unraisablehook", command.raise_again)
    Dying()  # gone at once
    try:
        with pytest.raises(stop):
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("words, told", [("Event loop is closed", False), ("something else", True)])
def test_what_outlives_a_failed_save_is_not_told(words, told, monkeypatch, capsys):
    class Dying:
        def __del__(self):
            raise RuntimeError(words)

    monkeypatch.setattr(sys, "unraisablehook", command.raise_again)
    Dying()
    assert (words in capsys.readouterr().err) is told


def test_flags_of_a_command_without_fields(capsys):
    values = flags_module.FlagValues()
    flags_module.DEFINE_string("checkpoint", None, "A folder.", values)
    assert command.execute(lambda: None, ["x", "--checkpoint=a"], values) == 0
    assert command.execute(lambda: None, ["x", "--config.training.steps=3"], values) == 2
    assert capsys.readouterr().err == "error: --config.training.steps is not a flag\n"


def fill(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(f"{{{name}}}", place)
    return text


def disk(root: str) -> dict[str, tuple]:
    """Everything below `root` but the cache: name, kind, size and time of change."""
    return {str(path): (path.is_dir(), *((s.st_size, s.st_mtime_ns) if not path.is_dir() else ()))
            for path in Path(root).rglob("*") for s in [path.stat()] if Path(root) / "cache" not in path.parents}
