"""Makes a cache of the authors' released Parquet: what `precompute` would otherwise make."""

import ml_collections
from etils import epath

from lopd import config as lopd_config
from lopd.artefacts.artefact import Artefact
from lopd.artefacts.fingerprint import params_fingerprint
from lopd.cache import released
from lopd.cache.codec import content_digest
from lopd.checkpoints import hugging_face
from lopd.data.tokenizers import check_vocabulary
from lopd.errors import UserError
from lopd.machine import devices
from lopd.machine.storage import absolute
from lopd.models.decoder import Params
from lopd.rollouts.scoring import score_responses
from lopd.stages import common
from lopd.stages.run import Context


def _ref_params(ctx: Context) -> tuple[Params, str]:
    """π_ref's weights and fingerprint, from `sft.checkpoint`."""
    if ctx.given("sft"):
        return ctx.load_params("sft", "student"), ctx.input("sft").outputs["fingerprint"]
    if not ctx.external("sft"):
        raise UserError(
            "sft.checkpoint is not set: the file lacks π_ref's log-probs, so give the student that "
            "its responses were sampled from"
        )
    params = ctx.read_checkpoint(hugging_face.resolve_checkpoint(ctx.external("sft")), "student")
    return params, params_fingerprint(params)


def run(config: ml_collections.ConfigDict, source: str, out: epath.PathLike) -> str:
    """Imports released Parquet into the directory `out`, for `opd.cache`; continues if interrupted.

    Lengths, tokenizer and student are those of the settings. The file does not say which teacher
    scored it: the outputs have the name in `teacher.checkpoint`.

    Returns:
      A report in one line.

    Raises:
      UserError: if the file does not fit the settings, or `out` was made from another.
    """
    lopd_config.validate(config, ("precompute",))
    artefact = Artefact(absolute(out))
    ctx = Context(config, artefact.path.parent, devices.make_mesh(config.mesh.to_dict()))
    recipe, limit = config.precompute, config.prompt_length
    check_vocabulary(ctx.tokenizer, ctx.model("student").vocab_size, "the embedding of the student")
    records, report = released.read_released(
        source, ctx.tokenizer, prompt_length=limit, response_length=recipe.response_length
    )
    params, fingerprint = _ref_params(ctx)
    settings = common.stage_settings(ctx, "precompute", "prompt_length", "dtype")
    inputs = {
        "released": f"{content_digest(records):064x}"[:16],
        "sft": fingerprint,
        "teacher": config.teacher.checkpoint or "not declared",
    }
    artefact.check("settings", settings)
    artefact.check("inputs", inputs)
    if not artefact.complete:
        artefact.begin("precompute", settings, inputs)
        outputs = released.import_released(
            artefact,
            records,
            report,
            lambda part: score_responses(
                ctx.model("student"),
                params,
                part,
                mesh=ctx.mesh,
                row_length=recipe.row_length,
                rows_per_micro=config.runtime.rows_per_micro,
            ),
            records_per_shard=config.runtime.records_per_shard,
        )
        identity = {key: inputs[key] for key in ("sft", "teacher")}
        artefact.finish({**outputs, **identity, "tokenizer": ctx.tokenizer_source})
    return f"{artefact.path}: {report.describe()}"
