"""The tokenizer of an exported folder: its ids, its chat templates, and how its prompts begin."""

import json
import logging
import resource
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tensorlm.data.prepare.encode import encode
from tensorlm.data.tokenizer.reading import check_plain_reading
from tensorlm.data.tokenizer.tokenizers import copy_tokenizer, load_tokenizer, tokenizer_sha256
from tensorlm.hf.imported_tokenizer import describe_another_tokenizer
from tensorlm.runtime.errors import UserError
from tests.support.hf_models import launcher_here, random_checkpoint, tiny_llama
from tests.support.tokenizer_folders import (
    SOURCES,
    TEXTS,
    byte_level,
    ids_of_file,
    like_llama2,
    write_folder,
)

CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
TOOLS = "tools: {{ messages[0]['content'] }}"


def with_templates(folder: Path) -> Path:
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text(TOOLS)
    return folder


def with_template(form: str, *around: str) -> str:
    """A `tokenizer.json` that puts special tokens around "$A"."""
    value = json.loads(form)
    tokens = {t["content"]: t["id"] for t in value["added_tokens"]}
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}}
            if name == "$A"
            else {"SpecialToken": {"id": name, "type_id": 0}}
            for name in around
        ],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in tokens.items()},
    }
    return json.dumps(value)


def test_the_check_of_an_exported_tokenizer_prints_no_warning_of_transformers(
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "tok", byte_level())
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        check_plain_reading(folder, "tensorlm")
    finally:
        logger.removeHandler(handler)
    # "You are using a model of type `tensorlm` to instantiate a model of type ``", for one.
    assert [record.getMessage() for record in records] == []


@pytest.mark.parametrize("fold", ["[]", "[4,8]"])
def test_plain_transformers_reads_the_ids_of_the_file_in_an_exported_folder(
    tmp_path: Path, config: Path, fold: str
) -> None:
    folder = write_folder(tmp_path / "tok", like_llama2(), tokenizer_class="LlamaTokenizer")
    encode(SOURCES[:1], folder, tmp_path / "set")
    options = [f"model.fold={fold}", f"data.path={tmp_path / 'set'}"]
    random_checkpoint(config, *options)
    output = tmp_path / "hf"
    export = ["export", "--config", str(config), "--output", str(output), *options]
    assert launcher_here("convert.py", *export) == 0
    wanted = ids_of_file(folder, TEXTS)
    for trust in (True, False):
        plain = AutoTokenizer.from_pretrained(output, trust_remote_code=trust)
        found = plain(TEXTS, add_special_tokens=False, split_special_tokens=True)
        assert found["input_ids"] == wanted


def test_chat_templates_go_with_the_data_and_the_export(tmp_path: Path, config: Path) -> None:
    folder = with_templates(write_folder(tmp_path / "tok", byte_level()))
    encode(SOURCES[:1], folder, tmp_path / "set")
    random_checkpoint(config)
    output = tmp_path / "hf"
    export = ("export", "--config", config, "--output", output, f"data.path={tmp_path / 'set'}")
    assert launcher_here("convert.py", *export) == 0
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    messages = [{"role": "user", "content": "Hello"}]
    found = tokenizer.apply_chat_template(messages, tokenize=False)
    assert found == "[user] Hello"
    found = tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tools")
    assert found == "tools: Hello"
    copy_tokenizer(write_folder(tmp_path / "without", byte_level()), tmp_path / "set/tokenizer")
    assert not list((tmp_path / "set").rglob("*.jinja"))


@pytest.mark.parametrize("same", [True, False])
def test_data_without_a_chat_template_get_that_of_the_same_imported_tokenizer(
    tmp_path: Path, config: Path, same: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "Model"
    tiny_llama().save_pretrained(model)
    with_templates(write_folder(model, byte_level(), tokenizer_class="GPT2Tokenizer"))
    folder = write_folder(
        tmp_path / "set/tokenizer", byte_level() if same else like_llama2(),
        tokenizer_class="GPT2Tokenizer",
    )  # fmt: skip
    options = ["model.fold=[]", f"data.path={folder.parent}"]
    assert launcher_here("convert.py", "import", "--config", config, "--hf", model, *options) == 0
    note = f"note: {folder.parent} was encoded with another tokenizer than that of"
    assert (note in capsys.readouterr().out) != same
    output = tmp_path / "hf"
    export: list[str | Path] = ["export", "--config", config, "--output", output, *options]
    if not same:
        export += ["--tokenizer", folder]
    assert launcher_here("convert.py", *export) == 0
    found = {str(path.relative_to(output)) for path in output.rglob("*.jinja")}
    names = {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert found == (names if same else set())
    printed = capsys.readouterr().out
    assert (note in printed) != same
    assert ("their vocabularies differ" in printed) != same


def test_weights_without_training_are_exported_with_their_own_tokenizer(
    tmp_path: Path, config: Path
) -> None:
    model = write_folder(tmp_path / "Model", byte_level())
    tiny_llama().save_pretrained(model)
    folder = write_folder(tmp_path / "set/tokenizer", like_llama2())
    options = ["model.fold=[]", f"data.path={folder.parent}"]
    common = ["--config", str(config), *options]
    assert launcher_here("convert.py", "import", "--hf", model, *common) == 0
    assert launcher_here("convert.py", "export", "--output", tmp_path / "hf", *common) == 0
    assert ids_of_file(tmp_path / "hf", TEXTS) == ids_of_file(model, TEXTS)


def test_a_note_names_what_differs_between_two_tokenizers(tmp_path: Path) -> None:
    one = write_folder(tmp_path / "one", byte_level())
    same = write_folder(tmp_path / "same", byte_level(), tokenizer_class="GPT2Tokenizer")
    copy_tokenizer(same, tmp_path / "copy")
    assert describe_another_tokenizer(same, tmp_path / "copy", "data") is None
    assert describe_another_tokenizer(None, one, "data") is None
    assert describe_another_tokenizer(tmp_path, one, "data") is None
    form = json.loads(byte_level())
    form["model"]["merges"] = form["model"]["merges"][:-20]
    cases = {
        "their files differ, but their ids are the same for all compared texts": (
            write_folder(tmp_path / "template", byte_level(), chat_template="x")
        ),
        "their vocabularies differ": write_folder(tmp_path / "llama", like_llama2()),
        "the ids of BOS and EOS differ": (
            write_folder(tmp_path / "ends", byte_level(), bos_token="</s>")
        ),
        "their ids differ, for example for": write_folder(tmp_path / "merges", form),
    }
    for words, other in cases.items():
        note = describe_another_tokenizer(other, one, "data")
        assert note
        assert note.startswith(
            f"note: data was encoded with another tokenizer than that of {other}"
        )
        assert words in note


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (("<s>", "$A"), None),
        (("$A",), "does not add BOS"),
        (("<s>", "$A", "</s>"), "turns a prompt into ['<s>', 'a', '</s>']"),
    ],
)
def test_an_export_says_where_prompts_begin_otherwise_than_documents(
    tmp_path: Path,
    config: Path,
    capsys: pytest.CaptureFixture[str],
    around: tuple[str, ...],
    words: str | None,
) -> None:
    random_checkpoint(config)
    folder = write_folder(tmp_path / "tok", with_template(byte_level(), *around))
    output = tmp_path / "hf"
    export = ("export", "--config", config, "--output", output, "--tokenizer", folder)
    assert launcher_here("convert.py", *export) == 0
    printed, card = capsys.readouterr().out, (output / "README.md").read_text()
    if words is None:
        assert "note" not in printed
        assert "Prompts" not in card
    else:
        assert f"note: the tokenizer {words}" in printed
        assert f"**Prompts.** The tokenizer {words}" in card


def test_a_tokenizer_whose_training_was_cut_off_between_files_is_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tok"
    train = ["tokenizer", "--input", *SOURCES[:9], "--vocab-size", "500", "--output", str(output)]
    model = tmp_path / "first"
    assert launcher_here("prepare_data.py", *train[:-1], model) == 0
    size = (model / "tokenizer.model").stat().st_size
    assert size < (model / "tokenizer.json").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert launcher_here("prepare_data.py", *train) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (output / "tokenizer.model").exists()
    assert not (output / "tokenizer.json").exists()
    with pytest.raises(
        UserError, match=r"tok: must contain a complete tokenizer, got one whose training"
    ):
        load_tokenizer(output)
    assert launcher_here("prepare_data.py", *train) == 0
    assert tokenizer_sha256(output) == tokenizer_sha256(model)
    assert {path.name for path in output.iterdir()} == {path.name for path in model.iterdir()}
    assert launcher_here("prepare_data.py", *train) == 2
    assert "already contains a tokenizer" in capsys.readouterr().err
