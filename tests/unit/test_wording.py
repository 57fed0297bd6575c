"""How messages say counts and sizes."""

import pytest

from dreambooth.wording import counted, shortlist, size


@pytest.mark.parametrize(
    "number, words",
    [(0, "0.00 KiB"), (3072, "3.00 KiB"), (2**19, "0.50 MiB"), (1_589_408, "1.52 MiB"), (3_930_325_776, "3.66 GiB")],
)
def test_sizes_have_the_unit_that_fits_them(number, words):
    assert size(number) == words


def test_counts_and_lists():
    assert [counted(1, "photo"), counted(1200, "photo")] == ["1 photo", "1,200 photos"]
    assert [shortlist(["a", "b"]), shortlist(["a", "b", "c"], most=1)] == ["a, b", "a and 2 more"]
