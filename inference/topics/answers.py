"""What a posterior of a topic story answers: topics, shares of documents, assignments of words, densities of documents."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Dirichlet

from .documents import Documents, blocks, in_parts
from .variational import mean_log, shares_given

if TYPE_CHECKING:
    from ..posterior import Posterior
    from ..score import Score
    from .form import Admixture

#: Draws of the topics that questions about documents are averaged over.
TOPIC_DRAWS = 10
#: Proposals of shares for each document and draw of the topics.
PROPOSALS = 200
#: Documents whose shares are written at once.
WRITTEN = 16_384


def form_of(posterior: Posterior) -> Admixture:
    """The roles of the story's sites.

    Raises
    ------
    TypeError
        The story is no topic model.
    """
    form = getattr(getattr(posterior, "problem", None), "admixture", None)
    if form is None:
        raise TypeError(
            f"this needs the posterior of a topic model (shares ~ Dirichlet, words from a mixture of topics); got "
            f"{type(posterior).__name__} of sites {[s.name for s in posterior.structure.sites]}"
            if hasattr(posterior, "structure")
            else f"this needs the posterior of a topic model, got {type(posterior).__name__}"
        )
    return form


def topics_of(posterior: Posterior, draws: list[int] | None = None) -> Tensor:
    """Mean topics, (K, V), or (K, T, V) of a dynamic model; over all draws or some."""
    form = form_of(posterior)
    value = posterior.draws[form.topics]
    value = value if draws is None else value[draws]
    return (value.softmax(-1) if form.walk else value).double().mean(0)


def alpha_of(posterior: Posterior, index: int | None = None) -> Tensor:
    """Concentrations of the shares, (K,): the story's, or learned ones."""
    form = form_of(posterior)
    if form.alpha_param is None:
        return form.alpha.double().cpu()
    value = posterior.draws[form.alpha_param].double().cpu()
    return (value.mean(0) if index is None else value[index]).expand(form.num_topics)


def documents_of(posterior: Posterior, data: Any) -> Documents:
    """Documents of the fit (None), of a corpus or counts over the same words, or of the story's arguments."""
    form = form_of(posterior)
    if data is None:
        return form.documents(posterior.problem.kwargs)
    if isinstance(data, Mapping | tuple):
        return form.documents(posterior.problem.with_data(data))
    whole = not torch.as_tensor(data).is_floating_point() if isinstance(data, Tensor | np.ndarray | list) else False
    if form.layout == "tokens" and whole:
        return form.documents(posterior.problem.with_data(data))
    documents = Documents.of(data)
    if documents.num_words > form.num_words:
        raise ValueError(
            f"the documents are counted over {documents.num_words} words, the topics are over {form.num_words}: use the same "
            f"vocabulary"
        )
    return documents


def shares(posterior: Posterior, data: Any = None, path: str | Path | None = None) -> Tensor:
    """Mean shares of topics in each document, (D, K), of the fitted ones or of new ones.

    Parameters
    ----------
    data
        None, a corpus, a sparse matrix or a table of counts, or the story's arguments.
    path
        A .npy file (float32) that is written some documents at a time and mapped: for corpora on disk, whose shares need
        not fit in memory either.  What was there before is replaced when all is written.

    Raises
    ------
    OSError
        There is no room, or no folder, for the file; nothing of it is left.
    """
    documents = documents_of(posterior, data)
    if path is None:
        return _mean_shares(concentrations(posterior, documents, fitted=data is None))
    sizes = range(0, len(documents), WRITTEN)
    parts = (documents.cut(a, min(a + WRITTEN, len(documents))) for a in sizes)
    rows = (_mean_shares(concentrations(posterior, part, fitted=False)).float().numpy() for part in parts)
    write_table(Path(path), (len(documents), form_of(posterior).num_topics), rows)
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def write_table(path: Path, shape: tuple[int, int], rows: Iterable[np.ndarray]) -> None:
    """A .npy file of float32, some rows at a time, written beside and renamed.

    Not by way of a memory map: on a full disk that would end the process without a word.
    """
    beside = path.with_name(f"{path.name}.part")
    try:
        with open(beside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for part in rows:
                file.write(np.ascontiguousarray(part, "<f4").data)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            need = f"{shape[0]:,} x {shape[1]} numbers need {4e-6 * shape[0] * shape[1]:,.1f} MB at {path}"
            raise OSError(error.errno, f"{need}: {error.strerror}") from None
        raise


def _mean_shares(gammas: list[Tensor]) -> Tensor:
    """From concentrations under some draws of the topics."""
    return torch.stack([c / c.sum(1, keepdim=True) for c in gammas]).mean(0)


def concentrations(posterior: Posterior, documents: Documents, fitted: bool) -> list[Tensor]:
    """Concentrations of the shares of each document given one draw of the topics each: (D, K) tensors."""
    kept = posterior.extra.get("topics", {})
    if fitted and "theta.concentration" in kept:
        return [kept["theta.concentration"].double()]
    form = form_of(posterior)
    if "phi.concentration" in kept:
        table = mean_log(kept["phi.concentration"].double()).exp()
        return [_shares_at(form, table, alpha_of(posterior), documents)]
    values = posterior.draws[form.topics]
    found = []
    for i in posterior.some_draws(TOPIC_DRAWS):
        phi = (values[i].softmax(-1) if form.walk else values[i]).double().cpu()
        found.append(_shares_at(form, phi, alpha_of(posterior, i), documents))
    return found


def _shares_at(form: Admixture, table: Tensor, alpha: Tensor, documents: Documents) -> Tensor:
    """Variational shares of documents given topics (K, V) or (K, T, V)."""
    if table.ndim == 2:
        return shares_given(table.T.contiguous(), alpha, documents)
    if documents.times is None:
        raise ValueError("the documents have no times; a dynamic model needs the slice of each")
    times = np.asarray(documents.times)
    if len(times) and (times.min() < 0 or times.max() >= form.num_slices):
        raise ValueError(
            f"times run to {times.max()} and the story was fitted to slices 0 to {form.num_slices - 1}; for a later slice use "
            f"inference.topics.forecast(posterior)"
        )
    found = torch.empty(len(documents), form.num_topics, dtype=alpha.dtype)
    for t in np.unique(times):
        d = np.flatnonzero(times == t)
        found[torch.from_numpy(d)] = shares_given(table[:, t].T.contiguous(), alpha, documents.take(d))
    return found


# -- Posterior's questions -----------------------------------------------------------------------------------------------


def local(posterior: Posterior, site: str, data: Any, draws: int) -> Tensor:
    """Draws of the shares (draws, D, ..., K), or probabilities of the topic of every word (D, N, K)."""
    form, documents = form_of(posterior), documents_of(posterior, data)
    found = concentrations(posterior, documents, fitted=data is None)
    if site == form.z:
        kwargs = posterior.problem.kwargs if data is None else posterior.problem.with_data(data)
        ids = kwargs[form.argument].cpu()
        phi, total = topics_of(posterior), torch.zeros(())
        for gamma in found:
            p = mean_log(gamma).exp()[:, None] * phi.T[ids.clamp(0, form.num_words - 1)]
            p = torch.where((ids >= 0)[..., None], p, (gamma / gamma.sum(1, keepdim=True))[:, None].expand_as(p))
            total = total + p / p.sum(-1, keepdim=True)
        return total / len(found)
    with posterior.problem.scope(posterior.seed):
        count = math.ceil(draws / len(found))
        theta = torch.cat([Dirichlet(gamma).sample((count,)) for gamma in found])[:draws]
    return form.site_theta(theta)


def score(posterior: Posterior, data: Any, draws: int) -> Score:
    """log p(w_d | topics) of each document: importance sampling of its shares; exact for two topics and point topics."""
    from ..score import Score
    from .perplexity import exact, topics_and_documents

    form, documents = form_of(posterior), documents_of(posterior, data)
    plug_in = "plug-in" if posterior.kind == "point" else "estimate under q" if posterior.kind == "variational" else ""
    if form.num_topics == 2 and posterior.num_draws == 1:
        rows = torch.zeros(len(documents), dtype=torch.float64)
        for phi, alpha, part, where in topics_and_documents(posterior, documents):
            rows[torch.from_numpy(where)] = exact(phi, alpha, part)
        return Score(rows, "exact integral over the shares", torch.zeros_like(rows), plug_in or "exact")
    values, errors = [], []
    with posterior.problem.scope(posterior.seed):
        for i in posterior.some_draws(min(draws, TOPIC_DRAWS)):
            value = posterior.draws[form.topics][i].double().cpu()
            phi, alpha = (value.softmax(-1) if form.walk else value), alpha_of(posterior, i)
            gamma = _shares_at(form, phi, alpha, documents)
            log_p, error = importance(phi, alpha, gamma, documents)
            values.append(log_p)
            errors.append(error)
    table = torch.stack(values)
    rows = table.logsumexp(0) - math.log(len(table))
    ratio = (table - rows).exp()
    between = ratio.var(0) / len(table) if len(table) > 1 else torch.zeros_like(rows)
    within = (ratio.square() * torch.stack(errors)).sum(0) / len(table) ** 2
    name = f"importance sampling of the shares ({PROPOSALS} proposals a document), mean over {len(table)} draws of the topics"
    return Score(
        rows, name, (between + within).sqrt(), plug_in + (" estimate" if plug_in == "plug-in" else "") or "estimate"
    )


def importance(
    phi: Tensor, alpha: Tensor, gamma: Tensor, documents: Documents, proposals: int = PROPOSALS
) -> tuple[Tensor, Tensor]:
    """log p(w_d | phi) and the relative variance of the estimated density, (D,) each.

    Half of the proposals come from the variational shares, half from a wider Dirichlet around them; the mixture is the
    proposal, so that weights are bounded where either is good.
    """
    wide = alpha + 0.3 * (gamma - alpha)
    values = torch.zeros(len(documents), dtype=phi.dtype)
    errors = torch.zeros_like(values)
    numbered = ((first, block) for first, part in in_parts(documents) for block in blocks(part, phi.dtype, cells=4096))
    for first, block in numbered:
        rows = first + block.rows
        q = [Dirichlet(g[rows], validate_args=False) for g in (gamma, wide)]
        theta = torch.cat([f.sample((proposals // 2,)) for f in q]).clamp_min(1e-300)
        log_q = torch.logaddexp(q[0].log_prob(theta), q[1].log_prob(theta)) - math.log(2.0)
        prior = Dirichlet(alpha, validate_args=False).log_prob(theta)
        if phi.ndim == 2:
            W = phi[:, block.words].movedim(0, -1)
        else:
            times = torch.from_numpy(np.asarray(documents.times))[rows]
            W = phi[:, times[:, None], block.words].movedim(0, -1)
        p = (W @ theta.permute(1, 2, 0)).clamp_min(1e-300)  # (B, L, S)
        log_w = (p.log() * block.counts.unsqueeze(2)).sum(1).T + prior - log_q
        value = log_w.logsumexp(0) - math.log(len(log_w))
        values[rows] = value
        errors[rows] = (log_w - value).exp().var(0) / len(log_w)
    return values, errors
