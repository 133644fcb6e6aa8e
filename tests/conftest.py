"""Settings for all tests: Hypothesis profiles, one thread, and torch's generator under Hypothesis' control."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    print_blob=True,
    phases=[phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain],
)
hypothesis.settings.register_profile("deep", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


class TorchRandom:
    """What Hypothesis needs to put torch's global generator back to the same place before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small nets are slower on two threads, and two test workers share two cores."""
    torch.set_num_threads(1)
