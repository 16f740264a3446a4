"""Checks ONNX files and runs them in ONNX Runtime.

Reads a JSON array of cases from stdin, `{"model": FILE, "input": FILE}` each; the input is raw little-endian f32 in the
shape of the graph's own. Writes a JSON array: for each case what the file says of itself, and every output.
"""

import json
import sys

try:
    import numpy as np
    import onnx
    import onnxruntime
except ImportError as error:
    sys.exit(f"{error}: .venv/bin/python -m pip install -r tests/requirements.txt")


def types_by_operator(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Element types of the outputs of each kind of node."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    kinds = {v.name: onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values}
    found: dict[str, set[str]] = {}
    for node in inferred.graph.node:
        found.setdefault(node.op_type, set()).update(kinds[name] for name in node.output)
    return {op: sorted(names) for op, names in found.items()}


def run(case: dict[str, str]) -> dict[str, object]:
    onnx.checker.check_model(case["model"], full_check=True)
    model = onnx.load(case["model"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(case["model"], options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    volume = np.fromfile(case["input"], dtype="<f4").reshape(source.shape)
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(names, {source.name: volume})
    return {
        "opset": [[entry.domain, entry.version] for entry in model.opset_import],
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
        "types": types_by_operator(model),
        "input": [source.name, source.type, source.shape],
        "outputs": [
            {"name": name, "type": str(value.dtype), "shape": value.shape, "values": value.ravel().tolist()}
            for name, value in zip(names, outputs, strict=True)
        ],
    }


json.dump([run(case) for case in json.load(sys.stdin)], sys.stdout)
