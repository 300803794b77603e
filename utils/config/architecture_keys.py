"""The keys that the architecture of a new model may have: those of its configuration class in transformers.

transformers accepts any key without an error, so a mistyped key would train with a default.
"""

import ast
import contextlib
import importlib.util
from pathlib import Path
from typing import Any

from moreh.options import did_you_mean
from utils.config.section import key_error


def check_architecture_keys(architecture: dict[str, Any]) -> None:
    """Refuse a model type and keys that transformers does not know.

    Raises:
        PydanticCustomError: an unknown type or key.
    """
    model_type = str(architecture.get("model_type"))
    if architecture.keys() <= _declared_keys(model_type):
        return
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        suggestion = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise key_error("model_type", f"{model_type!r} is not a type that transformers knows{suggestion}")
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | set(CONFIG_MAPPING[model_type].attribute_map)
    unknown = [key for key in architecture if key not in known]
    if unknown:
        others = f" (nor {', '.join(unknown[1:])})" if len(unknown) > 1 else ""
        raise key_error(unknown[0], f"model_type {model_type} has no such key{others}{did_you_mean(unknown[0], known)}")


def with_tokenizer_keys(architecture: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """An architecture with keys of its tokenizer, such as `vocab_size`, unless it has them itself.

    Where the settings of the text model are nested, as Gemma 3's, they belong there: above, they would have no effect.
    """
    text_config = architecture.get("text_config")
    if isinstance(text_config, dict):
        return {**architecture, "text_config": keys | text_config}
    return keys | architecture


def _declared_keys(model_type: str) -> set[str]:
    """The keys that the source of a model type's configuration declares, nearly all that it has. Empty if not found.

    The source is read, not imported: importing any configuration of transformers imports torch, which takes seconds.
    Plans and errors elsewhere in the settings need not wait for torch.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None or not model_type.isidentifier():
        return set()
    source = Path(package.origin).parent / "models" / model_type / f"configuration_{model_type}.py"
    if not source.is_file():
        return set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            constants = _constants(node)
            if constants.get("model_type") == model_type:
                return {"model_type", *constants.get("attribute_map", {}), *_annotated_names(node)}
    return set()


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """The literals that a class assigns to names, such as `model_type = "gpt2"`."""
    constants = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name):
            with contextlib.suppress(ValueError):  # no literal
                constants[target.id] = ast.literal_eval(statement.value)
    return constants


def _annotated_names(node: ast.ClassDef) -> set[str]:
    """The fields of a dataclass, such as `n_layer: int = 12`."""
    return {
        statement.target.id
        for statement in node.body
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not statement.target.id.startswith("_")
    }
