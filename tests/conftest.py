"""Tests marked ``gpu`` run only when asked for (``pytest -m gpu``), and only where a GPU is."""

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" not in config.option.markexpr:
        for item in gpu_tests:
            items.remove(item)
        config.hook.pytest_deselected(items=gpu_tests)
    elif not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
