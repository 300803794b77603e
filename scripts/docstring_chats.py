"""Write conversations about the functions of installed packages: the data of configs/llama_smollm2_chat.yaml.

python scripts/docstring_chats.py data/docstring_chats.jsonl
python scripts/docstring_chats.py data/docstring_chats.jsonl stdlib torch numpy

Each has two turns: what a function does, which is the first line of its docstring, and how it is called.
"""

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils.cli import exit_code_of
from utils.data.sources.python_sources import STANDARD_LIBRARY, parse_source, source_files

SYSTEM = "You know the functions of Python's libraries."


def conversations(packages: list[str]) -> Iterator[list[dict[str, str]]]:
    """The messages of a conversation about each public function with a one-line summary.

    Raises:
        UserError: a package is not installed.
    """
    for path in source_files(packages, "the package"):
        parsed = None if path.stem.startswith("_") else parse_source(path)
        for node in parsed[1].body if parsed is not None else []:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                if summary.isascii() and summary.endswith("."):
                    yield _conversation(f"{path.stem}.{node.name}", summary, ast.unparse(node.args))


def _conversation(name: str, summary: str, arguments: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"What does {name} do?"},
        {"role": "assistant", "content": summary},
        {"role": "user", "content": "How is it called?"},
        {"role": "assistant", "content": f"{name}({arguments})"},
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write conversations about the functions of installed packages.")
    parser.add_argument("file", type=Path, help="the JSONL file to write")
    parser.add_argument("packages", nargs="*", default=[STANDARD_LIBRARY], help="default: %(default)s")
    arguments = parser.parse_args()
    rows = [json.dumps({"messages": messages}) for messages in conversations(arguments.packages)]
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    arguments.file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} conversations: {arguments.file}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main, debug=False))
