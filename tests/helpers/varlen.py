"""Variable-length attention on the CPU, in place of a GPU's."""

import torch

from moreh.runtime.kernels.attention import dispatch, varlen


def one_by_one(query, key, value, cu_seqlens, longest, scale):
    """Each sequence by itself, with torch's attention."""
    assert longest >= int(cu_seqlens.diff().max())
    assert cu_seqlens.dtype == torch.int32
    return varlen._one_by_one([query, key, value], cu_seqlens.tolist(), scale)


def as_one_sequence(query, key, value, cu_seqlens, longest, scale):
    """A fault: the sequences of a row see each other."""
    return varlen._one_by_one([query, key, value], [0, len(query)], scale)


def with_wrong_scale(query, key, value, cu_seqlens, longest, scale):
    """A fault: the scores are halved."""
    return one_by_one(query, key, value, cu_seqlens, longest, scale / 2)


class VarlenOnCpu:
    """Lets models on the CPU compute packed rows as a GPU does, with a function of tests; counts its calls."""

    def __init__(self, monkeypatch, function=one_by_one, *, is_proven=True):
        self.calls = 0

        def counted(*arguments):
            self.calls += 1
            return function(*arguments)

        monkeypatch.setattr(varlen, "varlen_function", lambda device_type: counted)
        monkeypatch.setattr(dispatch, "packed_by_varlen", lambda device: True)
        if is_proven:
            monkeypatch.setattr(varlen, "_is_proven", lambda *_: True)
