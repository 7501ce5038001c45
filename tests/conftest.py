"What several test files share."
import pytest


@pytest.fixture
def one_thread():
    "Numbers are compared to the last digits: sums in one order, that of a single thread."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
