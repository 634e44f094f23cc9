import numpy as np
import pytest

from hf_vla_actions.errors import VLAActionsError
from hf_vla_actions.metrics import action_metrics, gripper_accuracy, token_accuracy

MASK = np.array([[True, True], [True, False]])


def test_padding_does_not_count():
    true = np.zeros((2, 2, 2))
    predicted = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [99.0, 99.0]]])
    found = action_metrics(predicted, true, MASK, ("x", "y"), "l1")
    assert found == {"l1": 2.5, "l1/x": 3.0, "l1/y": 2.0}


def test_token_accuracy_per_dimension():
    true = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    predicted = np.array([[[1, 0], [3, 4]], [[0, 6], [0, 0]]])
    found = token_accuracy(predicted, true, MASK, ("x", "y"))
    assert found["token_accuracy/x"] == pytest.approx(2 / 3)
    assert found["token_accuracy/y"] == pytest.approx(2 / 3)
    assert found["token_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("open_value", "closed_value"), [(1.0, 0.0), (-1.0, 1.0)])
def test_gripper_accuracy_knows_which_side_is_open(open_value, closed_value):
    def at(share):
        return closed_value + np.array(share) * (open_value - closed_value)

    found = gripper_accuracy(
        at([[0.9, 0.2], [0.4, 0.0]]), at([[1.0, 1.0], [0.0, 1.0]]), MASK, open_value, closed_value
    )
    assert found["gripper_accuracy"] == pytest.approx(2 / 3)


def test_arrays_that_do_not_fit_raise():
    with pytest.raises(VLAActionsError, match="shapes"):
        token_accuracy(np.zeros((2, 2, 3)), np.zeros((2, 2, 2)), MASK, ("x", "y"))
    with pytest.raises(VLAActionsError, match="no step is real"):
        token_accuracy(np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), np.zeros((2, 2), bool), ("x", "y"))
