"""The files that a graph is written to: ONNX for onnxruntime, and .pt2 for torch.export.load; read back to verify them.

Each has the text of `description` inside: the metadata of an ONNX file and the extra files of a .pt2 hold model.json.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import torch

from xc.errors import UserError
from xc.use.graph import first_line, quiet

_DESCRIPTION = "model.json"


@dataclass(frozen=True)
class GraphFile:
    """A kind of file.

    name      of the file
    packages  that it needs
    write     (ExportedProgram, names of the outputs, description, path) -> None
    open      (path) -> function of pixels (N, channels, size, size) uint8 that gives [output] as tensors
    """

    name: str
    packages: tuple[str, ...]
    write: Callable
    open: Callable

    def require_packages(self):
        """UserError where a package is absent."""
        try:
            for package in self.packages:
                __import__(package)
        except Exception as e:  # a package that does not fit another one may raise anything
            raise UserError(f"{self.name} needs the packages {', '.join(self.packages)} ({first_line(e)}): pip install "
                            "-r requirements.txt, or leave its format out of --formats") from e


def _write_onnx(program, outputs, description, path):
    try:
        with quiet():
            model = torch.onnx.export(program, input_names=["pixels"], output_names=outputs, dynamo=True,
                                      dynamic_shapes={"pixels": {0: "N"}}, external_data=False, verbose=False)
    except Exception as e:  # an operator that ONNX lacks; the reason is at the end of the chain, behind pages of advice
        while e.__cause__:
            e = e.__cause__
        raise UserError(f"the backbone cannot be written as ONNX ({first_line(e)}): leave onnx out of --formats") from e
    model.model.metadata_props[_DESCRIPTION] = description
    model.save(path)


def _open_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: [torch.from_numpy(output) for output in session.run(None, {"pixels": pixels.numpy()})]


def _write_pt2(program, outputs, description, path):
    buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
    with quiet():
        torch.export.save(program, buffer, extra_files={_DESCRIPTION: description})
    with open(path, "wb") as file:
        file.write(buffer.getbuffer())


def _open_pt2(path):
    with quiet():
        graph = torch.export.load(path).module()
    return lambda pixels: list(graph(pixels).values())


GRAPH_FILES = {"onnx": GraphFile("model.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
               "pt2": GraphFile("model.pt2", (), _write_pt2, _open_pt2)}
