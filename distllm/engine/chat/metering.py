"""Spends a template's budget where Jinja's sandbox asks nobody: loops, macros, `~`, comparisons, slices,
keys. Works on the syntax tree, between Jinja's parser and its compiler.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from distllm.engine.chat.budget import CHARS_PER_STEP, Budget
from distllm.engine.chat.costs import everything, operand

BUDGET: ContextVar[Budget] = ContextVar("budget")  # of the rendering that runs in this thread


class Meter(Extension):
    """What the changed tree calls."""

    def spend(self, steps: int) -> bool:
        BUDGET.get().spend(steps)
        return True

    def whole(self, value: Any) -> Any:
        """The value, after all that is in it is spent."""
        self.spend(everything(BUDGET.get(), value))
        return value

    def shallow(self, value: Any) -> Any:
        """The value, after what a copy of it takes is spent."""
        self.spend(operand(BUDGET.get(), value))
        return value


class Metering(NodeTransformer):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test:  # is asked for items that the body never sees
            node.test = nodes.And(self._spend([node.test]), node.test)
        return self._metered_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._metered_body(self.generic_visit(node))

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._call("whole", each) for each in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """One constant leaves little to compare, unless it is looked for."""
        self.generic_visit(node)
        operands = [node.expr, *(each.expr for each in node.ops)]
        is_short = len(operands) == 2 and any(isinstance(each, nodes.Const) for each in operands)
        if not is_short or node.ops[0].op in ("in", "notin"):
            node.expr = self._call("whole", node.expr)
            for each in node.ops:
                each.expr = self._call("whole", each.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._call("shallow", node.node)
        elif not isinstance(node.arg, nodes.Const):  # a key that is a tuple is hashed, all of it
            node.arg = self._call("whole", node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._call("whole", node.key)
        return node

    def _metered_body(self, node: Any) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(self._spend(node.body)))
        return node

    def _spend(self, body: list[Any]) -> nodes.Expr:
        """Each time that this is run: a step for each of its nodes, and its text."""
        inside = [node for part in body for node in (part, *part.find_all(nodes.Node))]
        num_chars = sum(len(node.data) for node in inside if isinstance(node, nodes.TemplateData))
        return self._call("spend", nodes.Const(1 + len(inside) + num_chars // CHARS_PER_STEP))

    def _call(self, name: str, argument: nodes.Expr) -> nodes.Expr:
        return nodes.Call(self._meter.attr(name), [argument], [], None, None)
