"""The count of launches, on a sequence of thunks as XLA writes it down."""

import launches
import pytest

SEQUENCE = """\
000: kCommandBuffer [source       | next=003 (1)]
    001: kCustomKernel [source       | next=002 (1)] loop_add_fusion grid: [8, 1, 1]
    002: kCopy         [prev=001 (1) | sink        ] kCopy
003: kCustomCall    [prev=000 (1) | next=009 (1)] kCustomCall
009: kConditional   [prev=003 (1) | next=010 (1)]
  false_branch:
    No thunks.  true_branch:
    004: kCustomCall    [source       | next=005 (1)] kCustomCall
    005: kWhile         [prev=004 (1) | next=008 (1)]
      condition:
        006: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      body:
        007: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
    008: kSequential    [prev=005 (1) | sink        ]       011: kCopy [source | sink] kCopy
      012: kTriangularSolve [prev=011 (1) | sink        ] (no description)
010: kCustomKernel  [prev=009 (1) | sink        ] loop_add_fusion grid: [8, 1, 1]
"""


def test_launches_graphs_and_waits_are_counted_apart_from_those_of_branches():
    assert launches.count(SEQUENCE) == {
        "launches": 4,
        "graphs": 1,
        "waits": 1,
        "rare_launches": 5,
        "rare_waits": 1,
    }


def test_a_branch_in_a_graph_makes_no_host_wait():
    captured = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source       | next=004 (1)] loop_add_fusion grid: [8, 1, 1]
    004: kConditional  [prev=001 (1) | sink        ]
      false_branch:
        002: kCopy [source | sink] kCopy
      true_branch:
        003: kCustomKernel [source | sink] loop_add_fusion grid: [8, 1, 1]
"""
    found = launches.count(captured)
    assert (found["graphs"], found["waits"], found["rare_waits"]) == (1, 0, 0)


def test_what_holds_no_operation_is_an_error():
    with pytest.raises(RuntimeError, match="no operations in what XLA wrote: 'nothing'"):
        launches.count("nothing")
