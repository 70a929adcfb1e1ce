"""Chat templates, which `transformers` 5 keeps in separate files next to the tokenizer's.

They do not change the ids of a text, so the hash of a tokenizer does not include them.
"""

from pathlib import Path

from ..prepare.shard_writer import make_folder, write_atomically

CHAT_TEMPLATE = "chat_template.jinja"
_MORE = "additional_chat_templates"


def chat_template_files(folder: Path) -> dict[str, bytes]:
    """Content of the templates in a folder, by relative path."""
    paths = [folder / CHAT_TEMPLATE, *sorted((folder / _MORE).glob("*.jinja"))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def copy_chat_templates(source: Path, target: Path) -> None:
    """Replace the templates of `target` by those of `source`.

    Raises:
        UserError: they cannot be written.
    """
    files = chat_template_files(source)
    for name in chat_template_files(target).keys() - files.keys():
        (target / name).unlink()
    for name, content in files.items():
        make_folder((target / name).parent)
        write_atomically(target / name, content)
