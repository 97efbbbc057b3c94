"""What a run tells TensorBoard of its settings, read by TensorBoard itself where it is installed."""

import struct
from pathlib import Path

import pytest

from pipeline.plan.run_folder import RunFolder
from pipeline.runs import hyperparameters
from pipeline.runs.reading import read_run


def events(folder: Path) -> list:
    """Of all files in a folder; a record is its length, a checksum, the event, and another checksum."""
    from tensorboardX.proto.event_pb2 import Event  # not before MindSpore, which decides how protobuf works

    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[12 + length + 4 :]
    return found


@pytest.fixture
def run(plainly_trained) -> RunFolder:
    return plainly_trained.plan.run


def test_a_run_has_its_settings_its_metrics_and_its_end_for_the_tab_hparams(run):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    said = [value for event in events(run.tensorboard) for value in event.summary.value if "_hparams_" in value.tag]
    experiment, start, end = (HParamsPluginData.FromString(value.metadata.plugin_data.content) for value in said)
    assert [name.name.tag for name in experiment.experiment.metric_infos] == ["train/loss", "train/step_seconds"]
    found = start.session_start_info.hparams
    assert found["train.learning_rate"].number_value == 1e-3 and found["lora.rank"].number_value == 4
    assert found["data.flip"].bool_value is False and found["lora.targets"].string_value == "attention"
    assert not any(name.startswith(("paths.", "sample.", "controlnet.", "folder")) for name in found)
    assert end.session_end_info.status == 1  # a success


def test_settings_that_cannot_be_read_are_none(tmp_path):
    run = RunFolder(tmp_path)
    assert hyperparameters.of_run(run) == {}
    run.experiment.write_text("[]")
    assert hyperparameters.of_run(run) == {}


def test_tensorboard_shows_settings_and_the_last_loss_of_a_run(run):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(run.path.parent))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(run.path.parent))
    context = backend_context.Context(TBContext(data_provider=provider, logdir=str(run.path.parent)))
    experiment = context.experiment_from_metadata(
        RequestContext(), "", False, context.hparams_metadata(RequestContext(), ""), []
    )
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=9,
        allowed_statuses=[api_pb2.STATUS_SUCCESS],
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
    )
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    (group,) = handler.run().session_groups
    assert group.hparams["train.learning_rate"].number_value == 1e-3
    losses = [value.value for value in group.metric_values if value.name.tag == "train/loss"]
    assert losses == [pytest.approx(read_run(run.path).loss)]
