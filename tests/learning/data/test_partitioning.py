"""The syntax of partitionings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.learning.data import InvalidPartitioning, Partitioning
from fedbus.learning.data.partitioning import ALPHA_RANGE, SIGMA_RANGE, SizeLaw

alphas = st.floats(*ALPHA_RANGE)
sizes = st.one_of(
    st.builds(Partitioning, sizes=st.sampled_from(sorted(set(SizeLaw) - {SizeLaw.LOGNORMAL}))),
    st.builds(Partitioning, sizes=st.just(SizeLaw.LOGNORMAL), sigma=st.floats(*SIGMA_RANGE)),
)
partitionings = st.one_of(
    st.just(Partitioning()),
    st.builds(Partitioning, alpha=alphas),
    st.builds(Partitioning, classes=st.integers(1, 999_999)),
    sizes,
    st.builds(
        lambda one, classes: Partitioning(classes=classes, sizes=one.sizes, sigma=one.sigma),
        sizes,
        st.integers(1, 99),
    ),
)


@given(partitionings)
def test_the_text_of_a_partitioning_is_parsed_to_it(partitioning: Partitioning) -> None:
    assert Partitioning.parse(str(partitioning)) == partitioning


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("IID", "iid"),
        (" dirichlet:0.30 ", "dirichlet:0.3"),
        ("sizes:linear + classes:2", "classes:2+sizes:linear"),
        ("sizes:lognormal:1.0", "sizes:lognormal:1"),
        ("sizes:lognormal", "sizes:lognormal:1"),
    ],
)
def test_other_spellings_are_accepted(text: str, canonical: str) -> None:
    assert str(Partitioning.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is unknown"),
        ("random", "'random' is unknown"),
        ("iid:1", "iid has no options"),
        ("dirichlet", "dirichlet needs one number, for example dirichlet:0.3"),
        ("dirichlet:0", "ALPHA must be a number from 0.001 to 1000000"),
        ("dirichlet:nan", "ALPHA must be a number"),
        ("dirichlet:1,5", "ALPHA must be a number"),
        ("classes:0", "classes needs a whole number above 0"),
        ("classes:1.5", "classes needs a whole number above 0"),
        ("sizes", "sizes needs one of the laws below, for example sizes:linear or sizes:lognormal:1"),
        ("sizes:cubic", "sizes needs one of the laws below"),
        ("sizes:lognormal:-1", "SIGMA must be a number"),
        ("iid+classes:2", "only classes and sizes can be combined"),
        ("dirichlet:1+sizes:linear", "only classes and sizes can be combined"),
        ("classes:2+classes:3", "'classes' occurs twice"),
        ("classes:2+", "'' is unknown"),
    ],
)
def test_invalid_texts_list_what_is_allowed(text: str, reason: str) -> None:
    with pytest.raises(InvalidPartitioning) as error:
        Partitioning.parse(text)
    assert reason in str(error.value)
    assert str(error.value).endswith(
        "Allowed are iid, dirichlet:ALPHA, classes:K, sizes:linear, sizes:square, sizes:exponential, "
        "sizes:lognormal:SIGMA, classes:K+sizes:…"
    )
