"""All metrics in several processes of this machine: what one process measures."""

import math

import pytest

from evaluation_fakes import measured_by_pixels
from fastflow.distributed import World

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("processes", ["two", "four"])
def test_any_number_of_processes_measures_the_same(request, tmp_path, processes):
    """Features in the order of the samples, to the bit; moments to the rounding of float64."""
    alone = measured_by_pixels(World(), str(tmp_path / "one"))
    group = request.getfixturevalue(processes)
    for rows in group.run(measured_by_pixels, str(tmp_path / "many")):
        assert list(rows) == list(alone)
        for name, row in rows.items():
            if name == "fd_pixels":
                assert math.isclose(row.value, alone[name].value, rel_tol=1e-9)
            else:
                assert (row.value, row.spread) == (alone[name].value, alone[name].spread)
