"""Where a run went back from, for the launches after it."""

import pytest

from tests.support.worlds import run_ranks
from xc.checkpoint.rollback import Divergence, Rollbacks
from xc.comm.world import World
from xc.errors import UserError


@pytest.mark.parametrize("text", ["[" * 10**5, "5", '["a"]', "{", ""])
def test_a_list_of_rollbacks_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(ValueError, match="rollbacks.json is no list of steps: delete it"):
        run_ranks(3, lambda world: Rollbacks(1, tmp_path, world))


def test_steps_that_are_left_out_are_known_to_all_ranks(tmp_path):
    (tmp_path / "rollbacks.json").write_text("[21, 5]")
    for rollbacks in run_ranks(3, lambda world: Rollbacks(2, tmp_path, world)):
        assert rollbacks.skipped == {21, 20, 5, 4}


@pytest.mark.parametrize("most, text", [
    (0, "the loss of step 22 is nan: take a smaller --lr"), (1, "the run went back 1 times"),
    (2, "there is no checkpoint yet to go back to")])
def test_a_run_may_go_back_so_often(most, text, tmp_path):
    (tmp_path / "rollbacks.json").write_text("[5]")
    with pytest.raises(UserError, match=text):
        Rollbacks(most, tmp_path, World()).folder(Divergence(21, "the loss of step 22 is nan"))
