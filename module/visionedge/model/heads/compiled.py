"""Graphs that were compiled here before (`visionedge model compile`): bytes in, rows out, nothing to add."""

from collections.abc import Mapping
from dataclasses import dataclass

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import Signature
from visionedge.model.decoding import part
from visionedge.model.graph import Nodes
from visionedge.model.interpretation import Preprocess, Reading, picture_input, stated_preprocess
from visionedge.model.stamp import read_imprint


@dataclass(frozen=True, slots=True)
class CompiledRows:
    """Rows that are rows already, `count` of them."""

    output: str
    count: int

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The rows, or the first of them."""
        return self.output if self.count <= limit else part(nodes, self.output, 0, limit, 1)


@dataclass(frozen=True, slots=True)
class CompiledHead:
    """Known by what the compiler wrote into the metadata, and by that alone."""

    name: str = "compiled"

    def read(self, signature: Signature) -> Reading | None:
        """A reading with the head that was compiled.

        Raises:
            ModelError: the metadata is damaged, or the graph is not what it says.
        """
        imprint = read_imprint(signature.metadata)
        if imprint is None:
            return None
        picture = picture_input(signature)
        rows = signature.outputs[0] if len(signature.outputs) == 1 else None
        shape = None if rows is None else rows.shape
        if (
            picture is None
            or rows is None
            or shape is None
            or len(shape) != 3
            or shape[2] != 6
            or not shape[1]
        ):
            raise ModelError(f"says that it was compiled here, but is not so. Seen: {signature}")
        return Reading(
            head=imprint.head,
            input=picture,
            preprocess=stated_preprocess(signature, Preprocess()),
            decoder=CompiledRows(rows.name, shape[1]),
            class_count=imprint.classes,
            suppress=signature.metadata.get("visionedge.nms") != "false",
            evidence=(f"was compiled by visionedge {imprint.version}", *imprint.evidence),
        )


HEADS = (CompiledHead(),)
