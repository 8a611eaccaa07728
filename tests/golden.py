"""Find golden cases in `$QAT_GOLDENS`, and read their arrays as tensors."""

import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

OFQ = "ofq_goldens.npz"
FOLDER = Path(os.environ.get("QAT_GOLDENS", Path(__file__).parent / "goldens"))


@functools.cache
def _arrays(file: str) -> dict[str, np.ndarray]:
    path = FOLDER / file
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def cases(file: str, pattern: str) -> list[str]:
    """Names of the cases that match a pattern; a name is the part of a key before its last slash."""
    names = {key.rpartition("/")[0] for key in _arrays(file)}
    return sorted(name for name in names if re.fullmatch(pattern, name))


def parametrize(file: str, pattern: str):
    """A golden test for each case that matches the pattern; no test if there is none."""
    names = cases(file, pattern)
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("case", names)(test))


def tensor(file: str, key: str) -> torch.Tensor:
    """An array of a case, copied to a tensor."""
    return torch.from_numpy(np.array(_arrays(file)[key]))


def ofq(case: str, name: str) -> torch.Tensor:
    """An array of a case of OFQ."""
    return tensor(OFQ, f"{case}/{name}")


def scalar(file: str, key: str) -> torch.Tensor:
    """A number of a case as a scalar tensor; its shape in the file is () or (1,)."""
    return tensor(file, key).reshape(())


def number(file: str, key: str) -> float:
    """A number of a case."""
    return float(scalar(file, key))


def below(file: str, prefix: str) -> dict[str, torch.Tensor]:
    """All arrays whose keys start with `prefix/`, by the rest of the key."""
    return {
        k.removeprefix(prefix + "/"): torch.from_numpy(np.array(v))
        for k, v in _arrays(file).items()
        if k.startswith(prefix + "/")
    }


def has(file: str, key: str) -> bool:
    """True if the file contains the array."""
    return key in _arrays(file)
