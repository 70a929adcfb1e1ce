"""The ids of `tokenizer.json` in data, evaluation and plain `transformers`, or one line why not."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tensorlm.config import parse_config
from tensorlm.data.loader import open_rows
from tensorlm.data.prepare.encode import encode
from tensorlm.data.prepare.shard_writer import write_index
from tensorlm.data.shards import Corpus
from tensorlm.data.tokenizer.tokenizers import (
    DocumentEncoder,
    check_tokenizer,
    copy_tokenizer,
    largest_text_id,
    load_tokenizer,
    tokenizer_sha256,
)
from tensorlm.runtime.errors import UserError
from tests.data.test_data_tokenizers import LLAMA, train
from tests.support.hf_models import launcher_here
from tests.support.tokenizer_folders import (
    TEXTS,
    added_token,
    byte_level,
    ids_of_file,
    like_llama2,
    write_folder,
)

FORMS = {"byte level": byte_level, "like llama 2": like_llama2}
CLASSES = [
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "TokenizersBackend",
    "PreTrainedTokenizerFast",
    "OfNoLibrary",
    None,
]


def plain_ids(folder: Path, model_type: str | None) -> list[list[int]]:
    """The ids of plain `transformers` in a folder with a config.json of this kind, or without."""
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    (folder / "config.json").unlink(missing_ok=True)
    encoded = tokenizer(TEXTS, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


def assert_ids(folder: Path, copy: Path, wanted: list[list[int]]) -> None:
    """A tokenizer and its copy give documents these ids; so does the copy without this program."""
    copy_tokenizer(folder, copy)
    assert tokenizer_sha256(copy) == tokenizer_sha256(folder)
    for place in (folder, copy):
        encoder = DocumentEncoder(place)
        documents = [ids.tolist() for ids in encoder(TEXTS)]
        assert documents == [[encoder.bos_id, *ids, encoder.eos_id] for ids in wanted]
    loaded = load_tokenizer(folder)
    found = loaded(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert found == wanted
    for model_type in ("llama", "tensorlm", None):
        assert plain_ids(copy, model_type) == wanted


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("form", FORMS)
def test_every_class_gives_the_ids_of_the_file(tmp_path: Path, form: str, name: str | None) -> None:
    config = {} if name is None else {"tokenizer_class": name}
    folder = write_folder(tmp_path / "tokenizer", FORMS[form](), **config)
    assert_ids(folder, tmp_path / "copy", ids_of_file(folder, TEXTS))


def test_ends_that_only_the_class_knows_are_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tokenizer", like_llama2())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    encoder = DocumentEncoder(folder)
    assert (encoder.bos_id, encoder.eos_id) == (1, 2)


def test_encoded_data_have_the_ids_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "tok", byte_level(), tokenizer_class="GPT2Tokenizer")
    files = [tmp_path / f"{number}.txt" for number in range(len(TEXTS) - 1)]
    for path, text in zip(files, TEXTS, strict=False):
        path.write_bytes(text.encode())
    encode([str(path) for path in files], folder, tmp_path / "set")
    corpus = Corpus(tmp_path / "set/train")
    found = [corpus.tokens(d, 1, int(n) - 1).tolist() for d, n in enumerate(corpus.lengths)]
    assert found == ids_of_file(folder, TEXTS[:-1])
    assert launcher_here("prepare_data.py", "verify", tmp_path / "set") == 0


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "legacy": False}])
def test_a_sentencepiece_model_with_a_config_has_its_own_ids(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    processor = train(folder / "tokenizer.model", LLAMA)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert_ids(folder, tmp_path / "copy", processor.encode(TEXTS))


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_special_tokens_behind_a_sentencepiece_model_keep_their_ids(
    tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    size = train(folder / "tokenizer.model", LLAMA).get_piece_size()

    def write(index: int) -> None:
        decoder = {str(index): {"content": "<pad>", "special": True}}
        config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>"}
        if place == "added_tokens.json":
            (folder / place).write_text(json.dumps({"<pad>": index}))
        else:
            config |= {"added_tokens_decoder": decoder}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    write(size)
    copy_tokenizer(folder, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").pad_token_id == size
    assert DocumentEncoder(folder).vocab_size == size + 1
    assert largest_text_id(load_tokenizer(folder)) == size - 1
    write(size + 1)
    with pytest.raises(UserError, match=f"'<pad>' must be a special token .* got id {size + 1}"):
        DocumentEncoder(folder)


def test_dropout_of_merges_is_off(tmp_path: Path) -> None:
    form = json.loads(byte_level())
    wanted = ids_of_file(write_folder(tmp_path / "without", form), TEXTS)
    form["model"]["dropout"] = 0.3
    folder = write_folder(tmp_path / "tokenizer", form)
    assert any(ids_of_file(folder, TEXTS) != wanted for _ in range(9))
    assert_ids(folder, tmp_path / "copy", wanted)
    assert ids_of_file(tmp_path / "copy", TEXTS) == wanted


def with_unused_ids() -> dict[str, Any]:
    """Every second id is unused."""
    form: dict[str, Any] = json.loads(byte_level())
    form["model"]["vocab"] = {piece: 2 * i for piece, i in form["model"]["vocab"].items()}
    for token in form["added_tokens"]:
        token["id"] *= 2
    return form


def test_the_largest_id_says_how_large_a_vocabulary_with_unused_ids_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tokenizer", with_unused_ids())
    assert DocumentEncoder(folder).vocab_size == 999
    assert largest_text_id(load_tokenizer(folder)) == 998
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    encode([str(tmp_path / "a.txt")], folder, tmp_path / "set")
    corpus = Corpus(tmp_path / "set/train")
    assert corpus.vocab_size == 999
    tokens = np.asarray(corpus.tokens(0, 0, int(corpus.lengths[0])))
    assert tokens.max() >= 500
    assert (tokens % 2 == 0).all()


@pytest.mark.parametrize("place", ["tokenizer.json", "tokenizer_config.json"])
def test_an_added_token_that_the_library_moves_is_refused(tmp_path: Path, place: str) -> None:
    form, config = json.loads(byte_level()), {}
    if place == "tokenizer.json":
        form["added_tokens"].append(added_token("<gap>", 510, special=False))
    else:
        token = added_token("<gap>", 510)
        config["added_tokens_decoder"] = {str(token.pop("id")): token}
    folder = write_folder(tmp_path / "tokenizer", form, **config)
    with pytest.raises(UserError) as caught:
        DocumentEncoder(folder)
    (line,) = caught.value.problems
    wanted = f"{folder}: {place}: the id of the added token '<gap>' must be 500, where the"
    assert line.startswith(wanted)
    assert "got 510" in line


def earlier_data(folder: Path, tokenizer: Path) -> str:
    """A copy of a tokenizer as earlier versions made it, of the files as they are; their hash."""
    shutil.copytree(tokenizer, folder)
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


def test_data_of_earlier_versions_load_unless_their_ids_were_others(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "same", byte_level(), tokenizer_class="TokenizersBackend")
    sha256 = earlier_data(tmp_path / "set", folder)
    assert sha256 != tokenizer_sha256(folder)
    check_tokenizer(tmp_path / "set", sha256)
    other = write_folder(tmp_path / "other", byte_level(), tokenizer_class="GPT2Tokenizer")
    sha256 = earlier_data(tmp_path / "other set", other)
    with pytest.raises(
        UserError, match=r"other set: the data must have the ids of tokenizer\.json"
    ):
        check_tokenizer(tmp_path / "other set", sha256)


def test_sources_of_earlier_and_of_this_version_go_together(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tok", byte_level(), tokenizer_class="TokenizersBackend")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) * 20)
    paths = [tmp_path / "new", tmp_path / "old"]
    for path in paths:
        encode([str(tmp_path / "a.txt")], folder, path)
    shutil.rmtree(paths[1] / "tokenizer")
    sha256 = earlier_data(paths[1] / "tokenizer", folder)
    header = paths[1] / "train/shard-00000.json"
    header.write_text(header.read_text().replace(tokenizer_sha256(folder), sha256))
    write_index(paths[1] / "train", 1)
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {
            "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_layers": 1,
            "num_heads": 2, "num_kv_heads": 2,
        },
        "data": {"sources": [{"path": str(path)} for path in paths], "seq_len": 64},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2, "rows_per_step": 2},
    }  # fmt: skip
    open_rows(parse_config(config, "test"), "train")
