"""The examination that every algorithm takes: `check_algorithm(MyMethod())`, in a few seconds, on a tiny random model.

from fedloom.testing import check_algorithm

def test_my_method_keeps_the_laws() -> None:
    check_algorithm(MyMethod(strength=0.5))
"""

from fedloom.testing.examination import AlgorithmError, Report, check_algorithm

__all__ = ["AlgorithmError", "Report", "check_algorithm"]
