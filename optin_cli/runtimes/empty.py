"""Traced programs without what computes nothing: layers that lost all their units are constants, their bias.

Runtimes have no good way with tensors of no numbers: in ONNX a size of 0 means "the same as before". What reads such a
tensor and gives numbers sums over nothing: it gives zeros, and its bias. What made the tensor is then dead code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten
_BIASED = {
    _aten.linear.default: -1,
    _aten.conv1d.default: 1,
    _aten.conv2d.default: 1,
    _aten.conv2d.padding: 1,
    _aten.convolution.default: 1,
}
"""Operators on (input, weight, bias) that sum over the input's features -> the axis of their bias."""
_PRODUCTS = (_aten.matmul.default, _aten.mm.default, _aten.bmm.default)
_ADDED = _aten.addmm.default


def remove_empty(program: Any) -> None:
    """Replace, in place, what sums over no numbers in a torch.export.ExportedProgram."""
    graph = program.graph_module.graph
    changed = False
    for node in list(graph.nodes):
        if _sums_over_nothing(node):
            changed |= _replace(graph, node)
    if changed:
        graph.eliminate_dead_code()
    _drop_weights(program)
    program.graph_module.recompile()


def _drop_weights(program: Any) -> None:
    """Take weights of no numbers out that nothing reads: torch can't save several of them."""
    specs = program.graph_signature.input_specs
    by_name = {spec.arg.name: spec for spec in specs}
    for node in list(program.graph_module.graph.nodes):
        spec = by_name.get(node.name) if node.op == "placeholder" else None
        if spec is not None and spec.target in program.state_dict and _is_empty(node) and not node.users:
            program.graph_module.graph.erase_node(node)
            program.state_dict.pop(spec.target)
            specs.remove(spec)


def _sums_over_nothing(node: Any) -> bool:
    if node.op != "call_function" or not (node.target in _BIASED or node.target in (*_PRODUCTS, _ADDED)):
        return False
    read = node.args[1:3] if node.target is _ADDED else node.args[:2]
    return not _is_empty(node) and any(_is_empty(one) for one in read)


def _is_empty(node: Any) -> bool:
    value = getattr(node, "meta", {}).get("val")
    return isinstance(value, Tensor) and any(type(size) is int and size == 0 for size in value.shape)


def _replace(graph: Any, node: Any) -> bool:
    """Put zeros and the bias in the place of `node`; False where its open sizes are nowhere to be had."""
    value = node.meta["val"]
    with graph.inserting_before(node):
        sizes = [_size(graph, node, size) for size in value.shape]
        if any(size is None for size in sizes):
            return False
        found = graph.call_function(_aten.full.default, (sizes, 0.0), {"dtype": value.dtype})
        found.meta["val"] = value
        bias = node.args[0] if node.target is _ADDED else node.args[2] if len(node.args) > 2 else None
        if bias is not None and (node.target in _BIASED or node.target is _ADDED):
            if _BIASED.get(node.target, -1) == 1:  # (features,) before the positions
                shape = [-1, *[1] * (value.dim() - 2)]
                bias = graph.call_function(_aten.view.default, (bias, shape))
                bias.meta["val"] = node.args[2].meta["val"].view(shape)
            found = graph.call_function(_aten.add.Tensor, (found, bias))
            found.meta["val"] = value
    for made in (found, *found.all_input_nodes):
        made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
    node.replace_all_uses_with(found)
    return True


def _size(graph: Any, before: Any, size: Any) -> Any:
    """A size as the graph has it: a number, or a node that reads it from an earlier tensor that is not empty."""
    if type(size) is int:
        return size
    for node in graph.nodes:
        if node is before:
            return None
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or _is_empty(node):
            continue
        sizes: list[Any] = list(value.shape)
        for axis, there in enumerate(sizes):
            if type(there) is not int and there.node.expr == size.node.expr:
                found = graph.call_function(_aten.sym_size.int, (node, axis))
                found.meta["val"] = there
                return found
    return None
