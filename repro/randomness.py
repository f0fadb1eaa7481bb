"""Seeds of streams, and every random state that training draws from: saved in a checkpoint, restored from it."""

import random

import numpy as np
import torch


def hash_seed(seed: int, stage: int, name: str) -> int:
    """A seed for one stream, the same on every platform."""
    entropy = [seed, stage, *name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (third-party code may draw from it)
    random.seed(seed)


def random_states(generators: dict[str, torch.Generator]) -> dict:
    """Every random state that training can draw from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "generators": {key: generator.get_state() for key, generator in generators.items()},
    }


def restore_random_states(state: dict, generators: dict[str, torch.Generator]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    saved = state["numpy"]
    keys = saved["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached"]))  # noqa: NPY002
    saved = state["python"]
    random.setstate((saved["version"], tuple(saved["words"].tolist()), saved["gauss"]))
    for key, generator in generators.items():
        generator.set_state(state["generators"][key].cpu())
