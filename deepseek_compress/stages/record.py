"""Record: what a teacher says of a text, kept on disk for trainings that no longer need the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.distillation.cache import bytes_a_token, read_index
from deepseek_compress.distillation.documents import Document, read_documents
from deepseek_compress.distillation.objective import PIECE
from deepseek_compress.distillation.record import Kept, record_model, record_server
from deepseek_compress.distillation.server import Server
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer
from deepseek_compress.planning.costs import Memory, Work
from deepseek_compress.stages.base import Context, Forecast, Output, Stage


class Record(Stage, frozen=True):
    """The words of a teacher in memory, or behind a server: `distill: {teacher: record}` trains on them."""

    writes: ClassVar[str] = "artifact"
    kept: Kept = Kept()  # of each distribution
    temperature: float = Field(default=1.0, gt=0)  # that the student will be compared at
    documents: int | None = Field(default=None, gt=1)  # texts read from the calibration sources
    tokens: int | None = Field(default=None, gt=0)  # or as many as have so many tokens; neither: all there are
    length: int = Field(default=512, gt=1)  # tokens; longer texts are cut
    server: str | None = None  # http://HOST:PORT/v1 of a teacher that vLLM serves; the source gives the tokenizer
    server_model: str | None = None  # None: the first that the server names

    def problems(self, header: Header) -> list[DscError]:
        """Return a missing, unknown or misshaped tensor; what a server cannot say."""
        found = Architecture.of(header).problems() if self.server is None else []
        if self.server is not None and self.temperature != 1:
            found.append(DscError("record.temperature: servers give temperature 1", "leave it out"))
        if self.server is not None and self.kept.form not in ("auto", "top_k"):
            found.append(DscError(f"record.kept.form: {self.kept.form}, servers give top_k", "leave it out"))
        return found

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Return the teacher in float32; what is kept of each token, where the recipe says how many."""
        sizes = [info.elements for info in header.tensors.values()]
        cfg = Architecture.of(header).cfg
        tokens = self.tokens or (self.documents or 0) * self.length
        form = self.kept.settings(cfg.vocab_size, 1.0, 0).form
        size = tokens * bytes_a_token(self.kept.count, cfg.vocab_size, form)
        if self.server is not None:
            return Forecast(header, bytes=size or None)
        memory = Memory(4 * sum(sizes) + 6 * 4 * PIECE)
        return Forecast(header, bytes=size or None, memory=memory, work=Work(2.0 * sum(sizes) * tokens))

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the words to `context.out`; an interrupted recording goes on."""
        tokenizer = load_tokenizer(source.path)
        documents = read_documents(context.text.sources, tokenizer, self.length, self.documents, self.tokens)
        if self.server is not None:
            self._from_server(tokenizer, documents, context)
        else:
            known = (documents, self.kept, self.temperature, context.out, context.seed, context.progress)
            record_model(source, tokenizer, *known, context.device)
        index = read_index(context.out)
        facts: dict[str, Any] = {key: index[key] for key in ("form", "documents", "tokens", "bytes_a_token")}
        return Output("artifact", context.out, facts)

    def _from_server(self, tokenizer: Tokenizer, documents: Sequence[Document], context: Context) -> None:
        assert self.server is not None
        server = Server(self.server, min(self.kept.count, 20), tokenizer.vocab_size, self.server_model)
        mass = record_server(server, tokenizer, documents, context.out, context.progress)
        if server.positions:
            context.tell(
                f"the {server.count} likeliest tokens have {mass:.1%} of {server.model}'s probability; "
                "of the rest only its sum is kept, so what it prefers there is lost"
            )
