"""The share of a GPU that each worker gets."""

from fedbus.simulation.gpus import place_workers


def test_workers_share_the_gpus_in_turn() -> None:
    assert [one["CUDA_VISIBLE_DEVICES"] for one in place_workers(5, ("0", "GPU-7a"))] == [
        "0",
        "GPU-7a",
        "0",
        "GPU-7a",
        "0",
    ]


def test_workers_see_no_gpu_unless_they_are_given_some() -> None:
    assert [dict(one) for one in place_workers(2, ())] == [{"CUDA_VISIBLE_DEVICES": ""}] * 2
