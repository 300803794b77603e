"""`save_pretrained` is patched only while it records what files it would write."""

import pytest
import torch
from transformers import modeling_utils

from moreh.patches.save_pretrained import SAFE_SAVE_FILE, SPLIT_INTO_SHARDS, recording_weight_files
from tests.helpers.models.checkpoint_models import build_model


def test_files_are_recorded_instead_of_written(tmp_path):
    model = build_model("llama").to("meta")
    files = {}

    def record(tensors, filename, metadata):
        files[filename.rsplit("/", 1)[-1]] = (sorted(tensors), metadata)

    with recording_weight_files(record):
        assert SAFE_SAVE_FILE.is_active
        assert SPLIT_INTO_SHARDS.is_active
        model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json"]
    assert list(files) == ["model.safetensors"]
    names, metadata = files["model.safetensors"]
    assert names == sorted(model.state_dict())
    assert metadata == {"format": "pt"}


def test_transformers_own_functions_are_back_after_an_error():
    originals = modeling_utils.safe_save_file, modeling_utils.split_torch_state_dict_into_shards
    with pytest.raises(ZeroDivisionError), recording_weight_files(lambda *arguments: None):
        raise ZeroDivisionError
    assert (modeling_utils.safe_save_file, modeling_utils.split_torch_state_dict_into_shards) == originals
    assert not SAFE_SAVE_FILE.is_active


def test_tensors_without_data_that_share_memory_come_into_one_file():
    tensor = torch.empty(10, device="meta")
    with recording_weight_files(lambda *arguments: None):
        split = modeling_utils.split_torch_state_dict_into_shards(
            {"a": tensor, "b": torch.empty(10, device="meta"), "c": tensor[:5]},
            filename_pattern="m{suffix}",
            max_shard_size=40,
        )
    assert [sorted(names) for names in split.filename_to_tensors.values()] == [["a", "c"], ["b"]]
