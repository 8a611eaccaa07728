"""Read parts of an ONNX graph by name or operator."""

import onnx


def nodes_of(model, *operators):
    """Nodes of these operators, in order."""
    return [node for node in model.graph.node if node.op_type in operators]


def makers_of(model):
    """The node that computes each value."""
    return {name: node for node in model.graph.node for name in node.output}


def constants_of(model):
    """Stored arrays."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
