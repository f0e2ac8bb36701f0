"""What is read off compiled kernels (``compile_decode``): on excerpts of what Triton 3.6 made."""

import pytest

pytest.importorskip("triton")
from compile_decode import sums_of_copies

REDUCE = """#linear = #ttg.linear<{{register = [[0, 2]], lane = [{lanes}], warp = [[16, 0], [0, 1]], block = []}}>
    %low = "tt.reduce"(%acc) <{{axis = 0 : i32}}> ({{
    ^bb0(%a: f32 loc(#loc1), %b: f32 loc(#loc1)):
      %sum = arith.addf %a, %b : f32 loc(#loc1)
      tt.reduce.return %sum : f32 loc(#loc1)
    }}) : (tensor<32x16xf32, #linear>) -> tensor<16xf32, #ttg.slice<{{dim = 0, parent = #linear}}>> loc(#loc2)
"""


@pytest.mark.parametrize(
    "lanes,count",
    [
        ("[1, 0], [2, 0], [4, 0], [0, 0], [8, 0]", 1),  # threads 8 to 15 hold what 0 to 7 do: the sum is wrong
        ("[0, 4], [1, 0], [2, 0], [4, 0], [0, 0]", 0),  # copies beyond all others: it is right
        ("[1, 0], [2, 0], [4, 0], [8, 0], [0, 4]", 0),
    ],
)
def test_sums_that_take_copies_for_others_are_counted(lanes, count):
    assert sums_of_copies(REDUCE.format(lanes=lanes)) == count
