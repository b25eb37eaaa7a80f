"""Makes a cache of the authors' released Parquet: what `precompute` would otherwise make."""

import functools

from etils import epath

from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.cache import released
from lopd.cache.codec import content_digest
from lopd.config.catalogue import STUDENT
from lopd.config.checks import check_settings
from lopd.config.settings import Settings
from lopd.data.tokenizers import check_vocabulary
from lopd.errors import UserError
from lopd.machine import devices
from lopd.machine.storage import absolute
from lopd.models.decoder import Params
from lopd.rollouts.scoring import score_responses
from lopd.stages.identity import stage_settings
from lopd.stages.origins import Adopted, Given
from lopd.stages.run import Run
from lopd.stages.weights import load_params, read_checkpoint


def _ref_params(run: Run) -> tuple[Params, str]:
    """π_ref's weights and fingerprint, from `sft.checkpoint`."""
    origin = run.origin("sft")
    if isinstance(origin, Given):
        return load_params(run, "sft"), run.input("sft").outputs["fingerprint"]
    if not isinstance(origin, Adopted):
        raise UserError(
            "sft.checkpoint is not set: the file lacks π_ref's log-probs, so give the student that "
            "its responses were sampled from"
        )
    params = read_checkpoint(run, origin.folder, STUDENT)
    return params, params_fingerprint(params)


def import_file(settings: Settings, source: str, out: epath.PathLike) -> str:
    """Imports released Parquet into the directory `out`, for `opd.cache`; continues if interrupted.

    Lengths, tokenizer and student are those of the settings. The file does not say which teacher
    scored it: the outputs have the name in `teacher.checkpoint`.

    Returns:
      A report in one line.

    Raises:
      UserError: if the file does not fit the settings, or `out` was made from another.
    """
    check_settings(settings, ("precompute",))
    artefact = Artefact(absolute(out))
    run = Run(settings, artefact.path.parent, devices.make_mesh(settings.mesh.sizes))
    recipe, runtime = settings.precompute, settings.runtime
    check_vocabulary(run.tokenizer, run.model(STUDENT).vocab_size, "the embedding of the student")
    records, report = released.read_released(
        source,
        run.tokenizer,
        prompt_length=settings.prompt_length,
        response_length=recipe.response_length,
    )
    params, fingerprint = _ref_params(run)
    identity = {"sft": fingerprint, "teacher": settings.teacher.checkpoint or "not declared"}
    made_with = stage_settings(run, "precompute", "prompt_length", "dtype")
    inputs = {"released": f"{content_digest(records):064x}"[:16], **identity}
    artefact.check("settings", made_with)
    artefact.check("inputs", inputs)
    if not artefact.complete:
        artefact.begin("precompute", made_with, inputs)
        score = functools.partial(
            score_responses,
            run.model(STUDENT),
            params,
            mesh=run.mesh,
            row_length=recipe.row_length,
            rows_per_micro=runtime.rows_per_micro,
        )
        outputs = released.import_released(
            artefact, records, report, score, records_per_shard=runtime.records_per_shard
        )
        artefact.finish({**outputs, **identity, "tokenizer": run.tokenizer_source})
    return f"{artefact.path}: {report.describe()}"
