"""Graphs that `visionedge model compile` wrote: from bytes to rows."""

from dataclasses import dataclass

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.compiled_metadata import read_compiled_metadata
from visionedge.model.decoding import slice_axis
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    Preprocess,
    find_picture_input,
    read_stated_preprocess,
)


@dataclass(frozen=True, slots=True)
class CompiledDecoder(Decoder):
    """Passes on the `count` rows of a compiled graph."""

    output: str
    count: int

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """All rows, or the first `limit`."""
        return self.output if self.count <= limit else slice_axis(nodes, self.output, 0, limit, 1)


@dataclass(frozen=True, slots=True)
class CompiledHead:
    """Recognised by its compiled metadata only."""

    name: str = "compiled"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation with the head that was compiled.

        Raises:
            ModelError: the metadata is damaged, or does not fit the graph.
        """
        compiled_metadata = read_compiled_metadata(signature.metadata)
        if compiled_metadata is None:
            return None
        picture = find_picture_input(signature)
        rows = signature.outputs[0] if len(signature.outputs) == 1 else None
        count = None if rows is None or rows.rank != 3 or rows.side(2) != 6 else rows.side(1)
        if picture is None or rows is None or count is None:
            raise ModelError(
                f"says that visionedge compiled it, but its inputs or outputs differ. Seen: {signature}"
            )
        return ModelInterpretation(
            head=compiled_metadata.head,
            input=picture,
            preprocess=read_stated_preprocess(signature, Preprocess()),
            decoder=CompiledDecoder(rows.name, count),
            class_count=compiled_metadata.classes,
            needs_nms=signature.metadata.get("visionedge.nms") != "false",
            evidence=(f"was compiled by visionedge {compiled_metadata.version}", *compiled_metadata.evidence),
            compiled_from=compiled_metadata.sha256,
        )


HEADS = (CompiledHead(),)
