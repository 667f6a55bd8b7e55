from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from kvcal.artifacts import KvcalError
from kvcal.calibrate.blocks import make_blocks
from kvcal.calibrate.builtin import stdlib_text
from kvcal.calibrate.data import DATA_ALIASES, open_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CARD = """---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - split: test
    path: wikitext-103-raw-v1/test-*
  - split: train
    path: wikitext-103-raw-v1/train-*
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: train
    path: wikitext-2-raw-v1/train-*
---
# About
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, no network."""
    import datasets

    root = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _parquet(path: Path, **columns: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def _jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _dataset(root: Path, repo_id: str, card: str) -> Path:
    """A snapshot in the Hub cache, as the Hub client lays it out; put its files in with `_blob`."""
    repository = root / f"datasets--{repo_id.replace('/', '--')}"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    readme = repository / "blobs" / "readme"
    readme.write_text(card)
    (snapshot / "README.md").symlink_to("../../blobs/readme")
    return snapshot


def _blob(snapshot: Path, name: str, **columns: Any) -> None:
    blob = _parquet(snapshot.parents[1] / "blobs" / name.replace("/", "_"), **columns)
    (snapshot / name).parent.mkdir(exist_ok=True)
    (snapshot / name).symlink_to(blob)


def _error(spec: Any, split: str | None = None) -> str:
    with pytest.raises(KvcalError) as caught:
        list(open_data(spec, split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_files(here: Path) -> None:
    (here / "a.txt").write_bytes("\ufeffgrün\r\n".encode())
    data = open_data("a.txt")
    assert list(data) == ["grün\n"] and list(data) == ["grün\n"], "and again"
    assert data.source == {"kind": "local", "id": "a.txt", "files": ["a.txt"], "num_files": 1}


def test_folder_is_sorted_recursive_and_of_known_extensions(here: Path) -> None:
    for name in ("docs/b.md", "docs/a.py", "docs/sub/c.TXT", "docs/x.png", "docs/.git/d.txt", "docs/.hidden.md"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(f"this is {name}")
    (here / "docs" / "__init__.py").write_text("")
    data = open_data("docs")
    assert list(data) == ["this is docs/a.py", "this is docs/b.md", "this is docs/sub/c.TXT"]
    assert data.source["files"] == ["__init__.py", "a.py", "b.md", "sub/c.TXT"]
    assert data.source["skipped"] == ["x.png"] and data.source["num_skipped"] == 1
    (here / "docs" / "loop").symlink_to(here / "docs")
    (here / "docs" / "a.txt").symlink_to(here / "nowhere")
    (here / "docs" / "z.md").symlink_to(here / "docs" / "b.md")
    found = open_data("docs").source
    assert found["skipped"] == ["x.png", "a.txt", "loop"] and "z.md" in found["files"] and found["num_files"] == 5
    for name in ("loop", "a.txt", "z.md"):
        (here / "docs" / name).unlink()
    assert list(open_data("docs/*.md")) == ["this is docs/b.md"]
    assert open_data(str(here / "**" / "*.md")).source["files"] == ["docs/b.md"]
    assert open_data("docs/**/*.*[yT]").source["files"] == ["__init__.py", "a.py", "sub/c.TXT"]


@pytest.mark.parametrize("name", ["a.jsonl", "a[1]*.jsonl", "späce d.jsonl"])
def test_json_lines(here: Path, name: str) -> None:
    _jsonl(here / name, {"n": 1, "text": "one"}, {"n": 2, "text": None}, {"n": 3, "text": "three\nlines"})
    assert list(open_data(name)) == ["one", "three\nlines"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode()),
        ("strings.json", json.dumps(["one", "two"]).encode()),
        ("lines.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0)),
    ],
)
def test_other_json(here: Path, name: str, content: bytes) -> None:
    (here / name).write_bytes(content)
    assert list(open_data(name)) == ["one", "two"]


def test_parquet_on_disk_is_not_taken_for_a_hub_id(here: Path) -> None:
    rows = [f"row {index}" for index in range(2500)]
    _parquet(here / "part" / "a.parquet", text=rows, n=list(range(2500)))
    assert list(open_data("part/a.parquet")) == rows


def test_empty_shards_are_skipped(here: Path) -> None:
    import pyarrow

    _parquet(here / "d" / "a.parquet", text=pyarrow.array([], pyarrow.string()))
    (here / "d" / "b.jsonl").write_text("")
    _parquet(here / "d" / "c.parquet", text=["x"])
    assert list(open_data("d")) == ["x"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"content": ["c"], "text": ["t"], "z": ["z"]}, ["t"]),
        ({"content": ["c"], "title": ["t"]}, ["c"]),
        ({"body": ["b"]}, ["b"]),
    ],
    ids=["text", "content", "only-one"],
)
def test_text_column(here: Path, columns: dict[str, Any], expected: list[str]) -> None:
    _parquet(here / "a.parquet", **columns)
    assert list(open_data("a.parquet")) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.json"])
def test_ambiguous_columns_are_listed(here: Path, name: str) -> None:
    if name == "a.json":
        (here / name).write_text(json.dumps([{"question": "q", "answer": "a", "n": 1}]))
    else:
        _parquet(here / name, question=["q"], answer=["a"], n=[1])
    message = _error(name)
    assert name in message and all(f"{column} (" in message for column in ("question", "answer", "n"))
    _parquet(here / "n.parquet", text=[1, 2])
    assert "text (int64)" in _error("n.parquet")


def test_stdlib_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    train, heldout = open_data("stdlib"), open_data("stdlib:heldout")
    assert train.source == {"kind": "builtin", "id": "stdlib", "split": "train"}
    first = [text for _, text in itertools.islice(stdlib_text.documents("heldout"), 5)]
    assert list(itertools.islice(heldout, 5)) == list(itertools.islice(open_data("stdlib", "heldout"), 5)) == first
    assert next(iter(train)) not in first
    message = _error("stdlib", "test")
    assert "'test'" in message and "train, heldout" in message


def test_hub_data_from_a_cache_with_one_config(cache: Path) -> None:
    snapshot = _dataset(cache, "Salesforce/wikitext", CARD)
    lines = ["", " = A = \n", "", " one \n", " = = B = = \n", " two \n", "", " = C = \n", " three \n"]
    _blob(snapshot, "wikitext-2-raw-v1/train-00000-of-00001.parquet", text=lines)
    _blob(snapshot, "wikitext-2-raw-v1/test-00000-of-00001.parquet", text=[" = T = \n"])
    data = open_data("wikitext")
    assert list(data) == [" = A = \n one \n = = B = = \n two \n", " = C = \n three \n"], "lines make articles"
    assert data.source == {
        "kind": "hub",
        "id": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "train",
        "revision": COMMIT,
        "files": ["wikitext-2-raw-v1/train-00000-of-00001.parquet"],
        "num_files": 1,
    }
    assert json.loads(json.dumps(data.source)) == data.source
    assert list(open_data("wikitext", "test")) == list(open_data("wikitext:test")) == [" = T = \n"]
    assert open_data("Salesforce/wikitext:wikitext-2-raw-v1").source == data.source
    assert "choose one of test, train" in _error("wikitext", "nope")
    assert "choose one of wikitext-103-raw-v1, wikitext-2-raw-v1" in _error("Salesforce/wikitext:nope")
    assert "several configs: choose one of" in _error("Salesforce/wikitext")
    message = _error("wikitext-103")
    assert "only without the files of config wikitext-103-raw-v1, split train" in message and str(cache) in message


def test_hub_rows_are_documents(cache: Path) -> None:
    card = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/*.parquet\n---\n"
    _blob(_dataset(cache, "org/name", card), "en/a.parquet", text=[" = A = \n", "b"])
    data = open_data("org/name")
    assert list(data) == [" = A = \n", "b"] and data.source["config"] == "en"


def test_hub_data_without_a_card_of_files(cache: Path) -> None:
    snapshot = _dataset(cache, "org/name", "# About\n")
    assert "HF_HUB_OFFLINE" in _error("org/name")
    _blob(snapshot, "data/train-00000-of-00001.parquet", text=["a", "b"])
    _blob(snapshot, "data/test-00000-of-00001.parquet", text=["c"])
    assert list(open_data("org/name")) == ["a", "b"]
    assert list(open_data("org/name", "test")) == ["c"]
    message = _error("org/name", "nope")
    assert "'nope'" in message and "train" in message and "test" in message


def test_downloaded_data_set_folder(here: Path) -> None:
    """What `hf download --local-dir` leaves: a card, and configs that are not to be mixed."""
    (here / "wiki").mkdir()
    (here / "wiki" / "README.md").write_text(CARD)
    _parquet(here / "wiki" / "wikitext-2-raw-v1" / "train-0.parquet", text=["two"])
    _parquet(here / "wiki" / "wikitext-103-raw-v1" / "train-0.parquet", text=["many"])
    assert list(open_data("wiki:wikitext-2-raw-v1")) == list(open_data("wiki:wikitext-2-raw-v1:train")) == ["two"]
    assert "several configs" in _error("wiki")
    assert "no files of config wikitext-2-raw-v1, split test" in _error("wiki:wikitext-2-raw-v1", "test")


@pytest.mark.parametrize("path", ["../*.parquet", "/etc/*", "", "a**b", 3, None])
def test_a_card_cannot_point_outside(here: Path, path: Any) -> None:
    _parquet(here / "secret.parquet", text=["secret"])
    (here / "d").mkdir()
    (here / "d" / "ok.txt").write_text("fine")
    card = {"configs": [{"config_name": "x", "data_files": [{"split": "train", "path": path}]}]}
    (here / "d" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    try:
        assert "secret" not in list(open_data("d"))
    except KvcalError as error:
        assert "\n" not in str(error)


def test_alias_and_folder_of_the_same_name(here: Path) -> None:
    (here / "stdlib").mkdir()
    assert open_data("stdlib").source["kind"] == "builtin", "an unrelated folder is in nobody's way"
    (here / "stdlib" / "a.txt").write_text("mine")
    assert list(open_data("stdlib")) == ["mine"]


def test_unknown_names(here: Path) -> None:
    message = _error("wikitxt")
    assert "did you mean wikitext" in message and all(alias in message for alias in DATA_ALIASES)
    for spec in ("absent.txt", "some/absent.parquet", "./absent", "a/b/c", str(here / "absent")):
        assert f"data {spec}: does not exist" in _error(spec)
    assert "hf download org/absent --repo-type dataset" in _error("org/absent")
    assert "hf download allenai/c4 --repo-type dataset" in _error("c4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", "a.txt: not UTF-8 text"),
        ("a.md", b"\x00\x01\x02", "a.md: binary data"),
        ("a.txt", b"", "a.txt: contains no text"),
        ("a.txt", b" \n\t\n", "a.txt: contains no text"),
        ("a.jsonl", b"", "a.jsonl: contains no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": oops}\n', "a.jsonl: row 2: is not valid JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl: not UTF-8 text"),
        ("a.jsonl", bytes(range(256)), "a.jsonl: not UTF-8 text"),
        ("a.json", b'[{"text": "a"}', "a.json: row 2: is not valid JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
        ("a.parquet", b"", "a.parquet: contains no text"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: cannot be read"),
        ("a.csv", b"a,b\n", "a.csv: columns a (string), b (string), of which none"),
        ("a.docx", b"PK", "a.docx is none of .txt"),
        ("a.tar.gz", b"x", "unpack it"),
    ],
)
def test_bad_files_give_one_line(
    here: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, message: str
) -> None:
    import datasets

    logger = datasets.logging.get_logger("datasets")
    logger.addHandler(caplog.handler)
    (here / name).write_bytes(content)
    try:
        assert message in _error(name)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == "" and datasets.logging.get_verbosity() == datasets.logging.WARNING


def test_damaged_parquet(here: Path) -> None:
    path = _parquet(here / "a.parquet", text=["x" * 100] * 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "a.parquet: cannot be read" in _error("a.parquet")
    path.write_bytes(whole[:4] + b"\xff" * 26 + whole[30:])
    assert "a.parquet: cannot be read" in _error("a.parquet")


def test_nothing_there(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "empty" / "x.png").write_bytes(b"\x89PNG")
    assert "no files with text" in _error("empty")
    assert "no files with text" in _error("empty/*.txt")
    (here / "a.txt").write_text("x")
    assert "local files have no splits" in _error("a.txt", "train")


def test_reading_leaves_no_litter_and_sends_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    home = here / "home"
    home.mkdir()
    (here / "d").mkdir()
    _jsonl(here / "d" / "a.jsonl", {"text": "x"})
    _parquet(here / "d" / "b.parquet", text=["y"])
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)

    sent = []

    def session() -> Any:
        sent.append(1)
        raise AssertionError("the network was used")

    monkeypatch.setattr("datasets.load.get_session", session)
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.logging.get_verbosity()
    assert list(open_data("d")) == ["x", "y"]
    assert sorted(path.name for path in (here / "d").iterdir()) == ["a.jsonl", "b.parquet"]
    assert not list(home.iterdir()) and not sent
    assert (datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.logging.get_verbosity()) == before


@pytest.fixture
def letters(here: Path) -> Path:
    """Files of one letter each; how often it is in the blocks tells what was read of its file."""
    (here / "d").mkdir()
    (here / "d" / "a.txt").write_text("a" * 100_000)
    (here / "d" / "b.md").write_text("b" * 50)
    _jsonl(here / "d" / "c.jsonl", *[{"text": "c" * 10}] * 500)
    (here / "d" / "e.txt").write_text(" ")
    (here / "d" / "x.png").write_bytes(b"PNG")
    return here


def _counted(blocks: Any, tokenizer: Any) -> dict[str, int]:
    tokens = tokenizer.convert_ids_to_tokens(blocks.ids[blocks.counted].tolist())
    return {letter: tokens.count(letter) for letter in "abcd" if letter in tokens}


def test_all_files_are_in_the_blocks_and_the_source_says_what_was_read(letters: Path, tiny_tokenizer: Any) -> None:
    data = open_data("d")
    blocks = make_blocks(data, tiny_tokenizer, num_tokens=1000, seq_len=100, source=data.source)
    there = _counted(blocks, tiny_tokenizer)
    assert there["b"] == 50 and abs(there["a"] - there["c"]) < 60, "b.md has no more; the others share the rest"
    assert int(blocks.attended.sum()) == 1000
    source = dict(blocks.source)
    documents = source.pop("documents")
    assert 2 + there["c"] // 10 <= documents <= 2 + -(-there["c"] // 10)
    assert source == {
        **{
            "kind": "local",
            "id": "d",
            "files": ["a.txt", "b.md", "c.jsonl"],
            "num_files": 3,
            "tokens": sum(there.values()),
        },
        **{"file_tokens": [there["a"], there["b"], there["c"]], "num_tokens": 1000, "order_seed": 0},
        **{"skipped": ["x.png"], "num_skipped": 1, "unread": ["e.txt"], "num_unread": 1},
    }
    assert json.loads(json.dumps(source)) == source
    again = make_blocks(open_data("d"), tiny_tokenizer, num_tokens=1000, seq_len=100)
    assert again.content_hash == blocks.content_hash and again.source == blocks.source
    other = make_blocks(open_data("d", seed=1), tiny_tokenizer, num_tokens=1000, seq_len=100)
    assert other.content_hash != blocks.content_hash


def test_several_sources(letters: Path, tiny_tokenizer: Any) -> None:
    (letters / "d.tsv").write_text("id\tbody\n" + "1\tdddddddddd\n" * 90)
    _jsonl(letters / "c.jsonl", {"n": 1, "body": "c" * 9999})
    data = open_data(["d.tsv", "c.jsonl", "d/a.txt"], text_column="body", seed=5)
    blocks = make_blocks(data, tiny_tokenizer, num_tokens=600, seq_len=100)
    there = _counted(blocks, tiny_tokenizer)
    assert set(there) == {"a", "c", "d"} and min(there.values()) > 120
    source = blocks.source
    assert (source["kind"], source["id"], source["order_seed"]) == ("several", "d.tsv + c.jsonl + d/a.txt", 5)
    assert [(each["id"], each["tokens"], each.get("text_column")) for each in source["sources"]] == [
        *[("d.tsv", there["d"], "body"), ("c.jsonl", there["c"], "body"), ("d/a.txt", there["a"], None)]
    ]


def test_a_folder_of_thousands_of_files(here: Path, tiny_tokenizer: Any) -> None:
    (here / "d").mkdir()
    for number in range(1000):
        (here / "d" / f"{number:04}.txt").write_text("x" * 100)
    blocks = make_blocks(open_data("d"), tiny_tokenizer, num_tokens=200, seq_len=100)
    source = blocks.source
    assert source["num_files"] == len(source["files"]) == len(source["file_tokens"]) == 25, "8 tokens of each, and EOS"
    assert source["num_unread"] == 975 and len(source["unread"]) == 100
    assert sum(source["file_tokens"]) == source["tokens"] == int(blocks.counted.sum())
    assert source["files"] != [f"{number:04}.txt" for number in range(25)], "drawn, not the first ones"


def test_what_is_given_twice(letters: Path) -> None:
    for given in (["d", "d"], ["d", "d/*.txt"], ["d/a.txt", "./d/a.txt"], ["stdlib", "stdlib:train"]):
        assert "already: give each text once" in _error(given)
    assert len(open_data(["stdlib", "stdlib:heldout"]).parts) == 2
    assert "an empty name" in _error([]) and "an empty name" in _error(["d", " "])


def test_a_text_column_where_there_are_no_columns(letters: Path) -> None:
    for given in ("d/a.txt", "stdlib"):
        with pytest.raises(KvcalError, match="has no columns"):
            open_data(given, text_column="body")


def test_folders_that_datasets_saved(here: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_dict({"id": ["x", "y", "z"], "text": ["one", "two", "three"]})
    rows.save_to_disk(here / "saved", num_shards=2)
    DatasetDict(train=rows, test=rows.select([2])).save_to_disk(here / "dict")
    (here / "outer").mkdir()
    rows.save_to_disk(here / "outer" / "saved")
    enable_progress_bars()
    (here / "saved" / "cache-0123.arrow").write_bytes(b"of a map over it")
    assert list(open_data("saved")) == ["one", "two", "three"]
    assert open_data("saved").source["files"] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for spec, split, expected in (
        *(("dict", None, ["one", "two", "three"]), ("dict:test", None, ["three"]), ("dict::test", None, ["three"])),
        *(("dict", "test", ["three"]), ("outer", None, ["one", "two", "three"])),
    ):
        assert list(open_data(spec, split)) == expected
    assert open_data("dict:test").source["split"] == "test"
    assert open_data("outer").source["skipped"] == ["saved/dataset_info.json", "saved/state.json"]
    assert "no split 'nope': choose one of train, test" in _error("dict", "nope")
    assert "was saved without splits" in _error("saved", "train")
    (here / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "state.json has not got 'data-00001-of-00002.arrow'" in _error("saved")
    (here / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../dict/a.arrow"}]}')
    (here / "dict" / "a.arrow").write_bytes(b"")
    assert "has not got '../dict" in _error("saved")
    (here / "dict" / "dataset_dict.json").write_text('{"splits": ["../outer/saved"]}')
    assert "has no list of splits" in _error("dict")


def test_of_many_files_of_a_data_set_a_few_are_drawn(cache: Path, tiny_tokenizer: Any) -> None:
    """The same ones from a card's list and by `datasets`, which finds them itself."""
    found = []
    card = "---\nconfigs:\n- config_name: x\n  data_files: data/*\n---\n"
    for repo_id, readme in (("org/card", card), ("org/name", "")):
        snapshot = _dataset(cache, repo_id, readme)
        for number in range(20):
            _blob(snapshot, f"data/train-{number:05}-of-00020.parquet", text=[chr(ord("a") + number) * 30])
        blocks = make_blocks(open_data(repo_id, seed=2), tiny_tokenizer, num_tokens=400, seq_len=100)
        assert (blocks.source["num_files"], blocks.source["num_unread"]) == (16, 4)
        letters = set(tiny_tokenizer.convert_ids_to_tokens(blocks.ids[blocks.counted].tolist()))
        assert len(letters) == 16
        found.append(blocks.content_hash)
        more = make_blocks(open_data(repo_id, seed=2), tiny_tokenizer, num_tokens=560, seq_len=100)
        assert more.source["num_files"] > 16 and int(more.attended.sum()) == 560, "where the drawn ones do not suffice"
    assert found[0] == found[1]
