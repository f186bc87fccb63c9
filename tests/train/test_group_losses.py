import pytest

from vlm.train.group_losses import GroupLosses

GROUPS = [("a", "text"), ("a", "video"), ("b", "text"), ("b", "video")]


def test_means_are_per_token_over_all_steps() -> None:
    losses = GroupLosses(GROUPS)
    losses.add([(6.0, 2), (10.0, 5), (0.0, 0), (9.0, 3)])
    losses.add([(4.0, 2), (0.0, 0), (0.0, 0), (0.0, 0)])
    assert losses.source_columns == ("loss_source_a", "loss_source_b")
    assert losses.take() == pytest.approx(
        {"loss_source_a": 20 / 9, "loss_source_b": 3.0, "loss_text": 2.5, "loss_video": 19 / 8}
    )
    # the next row starts anew, and says nothing of what did not come
    losses.add([(1.0, 1), (0.0, 0), (0.0, 0), (0.0, 0)])
    assert losses.take() == {"loss_source_a": 1.0, "loss_text": 1.0}
