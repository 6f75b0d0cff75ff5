"""METRICS: the only place where a metric's name, kind, unit, labels and help are written.

From it come what the agent exports, the dashboards and rules, and the README's table. Standard library only. For the
words used in the help texts see the glossary of `record`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MetricKind = Literal["counter", "gauge"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One Prometheus metric. `unit` is for people; the name already ends in it where the conventions ask for that."""

    name: str
    kind: MetricKind
    unit: str
    labels: tuple[str, ...]
    help: str


_RUN = ("run",)
_LAYER = ("run", "layer")
_RANK = ("run", "rank")
_HOST = ("host",)

#: Every metric gradmon exports. Those labelled by run alone are equal on all ranks and come from one rank of the run.
METRICS: tuple[Metric, ...] = (
    Metric(
        "gradmon_run_info",
        "gauge",
        "1",
        ("run", "run_instance", "attempt", "world_size", "mode", "topology", "script", "version"),
        "Always 1; what is constant for a run. The only place for the instance and the attempt.",
    ),
    Metric(
        "gradmon_rank_info",
        "gauge",
        "1",
        ("run", "rank", "local_rank", "host", "world_size", "device", "gpu_uuid", "gpu_pci_bus_id"),
        "Always 1; where a rank runs. Join on run and rank, or with dcgm-exporter's series, whose UUID is gpu_uuid.",
    ),
    Metric(
        "gradmon_world_size",
        "gauge",
        "ranks",
        _RUN,
        "Ranks the run has, as its living ranks know; absent from an agent on whose node none of them lives.",
    ),
    Metric(
        "gradmon_grad_norm",
        "gauge",
        "norm",
        _RUN,
        "Global gradient norm before clipping; the last finite value.",
    ),
    Metric(
        "gradmon_grad_norm_applied",
        "gauge",
        "norm",
        _RUN,
        "Norm of the gradients the optimizer used, after all clipping; 0 after a skipped step.",
    ),
    Metric(
        "gradmon_grad_norm_limit",
        "gauge",
        "norm",
        _RUN,
        "Norm above which a step is a spike; absent until the detector is active.",
    ),
    Metric(
        "gradmon_learning_rate",
        "gauge",
        "1",
        _RUN,
        "Learning rate set by the script, before gradmon's scale.",
    ),
    Metric(
        "gradmon_learning_rate_scale_ratio",
        "gauge",
        "ratio",
        _RUN,
        "Factor gradmon puts on the learning rate; 1 unless it backed off.",
    ),
    Metric(
        "gradmon_nonfinite_steps_total",
        "counter",
        "steps",
        _RUN,
        "Steps whose global gradients held NaN or Inf.",
    ),
    Metric(
        "gradmon_actions_total",
        "counter",
        "actions",
        ("run", "action", "reason", "applied"),
        "What gradmon did to a step, and why. applied=no: what it would have done where it only watches.",
    ),
    Metric(
        "gradmon_events_total",
        "counter",
        "events",
        ("run", "kind"),
        "What several steps together showed: spikes, skips or left-out steps in a row, drift, vanished gradients, "
        "gradients and loss diverging, replicas that differ, and what the watches over loss and weights found.",
    ),
    Metric(
        "gradmon_healthy",
        "gauge",
        "1",
        _RUN,
        "1 while a checkpoint of the weights as they are may push out an older one, else 0.",
    ),
    Metric(
        "gradmon_last_healthy_step",
        "gauge",
        "steps",
        _RUN,
        "Newest step after which the weights were fit to be kept.",
    ),
    Metric(
        "gradmon_last_incident_info",
        "gauge",
        "1",
        ("run", "rank", "parameter", "kind"),
        "Always 1; the newest incident of a run: rank and parameter that broke first. One series per run, replaced.",
    ),
    Metric(
        "gradmon_last_incident_step",
        "gauge",
        "steps",
        _RUN,
        "Step of the newest incident.",
    ),
    Metric(
        "gradmon_last_incident_timestamp_seconds",
        "gauge",
        "seconds",
        _RUN,
        "Unix time of the newest incident.",
    ),
    Metric(
        "gradmon_grad_abs_max",
        "gauge",
        "1",
        _RUN,
        "Largest absolute value in the global gradients before clipping; from the newest step with full statistics.",
    ),
    Metric("gradmon_grad_min", "gauge", "1", _RUN, "Smallest value in the global gradients before clipping."),
    Metric("gradmon_grad_max", "gauge", "1", _RUN, "Largest value in the global gradients before clipping."),
    Metric("gradmon_grad_zero_ratio", "gauge", "ratio", _RUN, "Share of the global gradients' elements that are 0."),
    Metric(
        "gradmon_local_grad_norm_rms",
        "gauge",
        "norm",
        _RUN,
        "Root mean square over all ranks of their gradient norms before the all-reduce.",
    ),
    Metric(
        "gradmon_local_grad_norm_max",
        "gauge",
        "norm",
        _RUN,
        "Largest gradient norm of any rank before the all-reduce.",
    ),
    Metric("gradmon_healthy_ranks", "gauge", "ranks", _RUN, "Ranks whose own gradients were finite in the last step."),
    Metric("gradmon_mean_loss", "gauge", "1", _RUN, "Mean loss over all ranks; the last finite value."),
    Metric("gradmon_max_loss", "gauge", "1", _RUN, "Largest loss of any rank; the last finite value."),
    Metric(
        "gradmon_validation_loss",
        "gauge",
        "1",
        _RUN,
        "Validation loss observed last, the last finite value; absent where none is observed.",
    ),
    Metric(
        "gradmon_early_stop",
        "gauge",
        "bool",
        _RUN,
        "1 once the validation loss has stopped falling, so that training on is a waste (monitor.should_stop), else 0; "
        "absent where none is observed.",
    ),
    Metric("gradmon_loss_scale", "gauge", "1", _RUN, "Factor of the script's GradScaler; absent without one."),
    Metric(
        "gradmon_scaler_skips_total",
        "counter",
        "steps",
        _RUN,
        "Steps that the script's GradScaler left out because scaled gradients overflowed; normal while it searches.",
    ),
    Metric(
        "gradmon_grad_noise_scale_ratio",
        "gauge",
        "ratio",
        _RUN,
        "Gradient noise scale over the global batch size, smoothed; above 1 a larger batch still pays.",
    ),
    Metric(
        "gradmon_update_ratio",
        "gauge",
        "ratio",
        _RUN,
        "Norm of the optimizer's update over the norm of the weights, on a sample of elements.",
    ),
    Metric(
        "gradmon_first_moment_norm",
        "gauge",
        "norm",
        _RUN,
        "Norm of the optimizer's running mean of gradients (exp_avg, momentum_buffer), from a sample of elements; "
        "absent where the optimizer keeps none.",
    ),
    Metric(
        "gradmon_second_moment_norm",
        "gauge",
        "norm",
        _RUN,
        "Norm of the optimizer's running mean of squared gradients (exp_avg_sq), from a sample of elements; absent "
        "where the optimizer keeps none.",
    ),
    Metric(
        "gradmon_layer_grad_norm",
        "gauge",
        "norm",
        _LAYER,
        "Norm of one layer's part of the global gradients before clipping, from steps with full statistics; the last "
        "finite value. A layer far above the others is where training breaks; one near 0 does not learn.",
    ),
    Metric(
        "gradmon_layer_grad_abs_max",
        "gauge",
        "1",
        _LAYER,
        "Largest absolute value in one layer's global gradients before clipping, over its finite elements.",
    ),
    Metric(
        "gradmon_layer_nonfinite_elements",
        "gauge",
        "elements",
        _LAYER,
        "NaN and Inf elements in one layer's global gradients, in the newest step with full statistics: the layers "
        "above 0 are the broken ones.",
    ),
    Metric(
        "gradmon_layer_grad_zero_ratio",
        "gauge",
        "ratio",
        _LAYER,
        "Share of one layer's gradient elements that are exactly 0. Near 1 hardly anything flows back (dead units), "
        "except for embeddings, whose unused rows are 0.",
    ),
    Metric(
        "gradmon_layer_update_ratio",
        "gauge",
        "ratio",
        _LAYER,
        "Norm of the optimizer's update over the norm of one layer's weights. About 0.001 is usual; far more makes "
        "training unstable, far less means the layer hardly learns.",
    ),
    Metric(
        "gradmon_series_dropped",
        "gauge",
        "series",
        _RUN,
        "Series per layer that metrics.series_budget left out, or that share the layer `other`; 0 when all are there.",
    ),
    Metric("gradmon_steps_total", "counter", "steps", _RANK, "Optimizer steps this rank has finished."),
    Metric(
        "gradmon_local_grad_norm",
        "gauge",
        "norm",
        _RANK,
        "This rank's gradient norm before the all-reduce; the last finite value.",
    ),
    Metric(
        "gradmon_local_nonfinite_elements_total",
        "counter",
        "elements",
        ("run", "rank", "kind"),
        "NaN or Inf elements in this rank's gradients before the all-reduce.",
    ),
    Metric(
        "gradmon_nonfinite_elements_total",
        "counter",
        "elements",
        ("run", "kind"),
        "NaN or Inf elements in the gradients the optimizer was given, after the all-reduce.",
    ),
    Metric(
        "gradmon_incidents_total",
        "counter",
        "steps",
        ("run", "rank", "kind"),
        "Steps broken by this rank's own gradients.",
    ),
    Metric(
        "gradmon_left_out_steps_total",
        "counter",
        "steps",
        _RANK,
        "Steps in which this rank's gradients were not finite and were left out of the average.",
    ),
    Metric("gradmon_loss", "gauge", "1", _RANK, "Loss this rank observed last; the last finite value."),
    Metric(
        "gradmon_nonfinite_losses_total",
        "counter",
        "steps",
        _RANK,
        "Steps whose observed loss was NaN or Inf, and validation losses that were.",
    ),
    Metric(
        "gradmon_data_findings_total",
        "counter",
        "findings",
        _RANK,
        "What the watch over this rank's batches found: values that are not finite or far out of range, batches that "
        "are constant or come twice, labels of mostly one class. The event says which sample.",
    ),
    Metric(
        "gradmon_class_imbalance_ratio",
        "gauge",
        "ratio",
        _RANK,
        "Samples of this rank's commonest class over those of its rarest, so far; absent where batches hold no labels.",
    ),
    Metric(
        "gradmon_token_share_ratio",
        "gauge",
        "ratio",
        _RANK,
        "Share of the commonest token among all tokens of the batches looked at on this rank, padding for instance; "
        "absent where batches hold none.",
    ),
    Metric(
        "gradmon_last_step_age_seconds",
        "gauge",
        "seconds",
        _RANK,
        "Time since this rank finished its last step, or attached; by the node's own clock. Absent once it has ended.",
    ),
    Metric("gradmon_step_duration_seconds", "gauge", "seconds", _RANK, "Duration of this rank's last step."),
    Metric(
        "gradmon_busy_seconds_total",
        "counter",
        "seconds",
        _RANK,
        "Time this rank spent in its steps before its gradients met the others': data, forward, backward. The rank "
        "with most per step holds the others up. DDP only.",
    ),
    Metric(
        "gradmon_data_wait_seconds_total",
        "counter",
        "seconds",
        _RANK,
        "Time this rank waited for its DataLoader's next batch; absent where the script uses none.",
    ),
    Metric(
        "gradmon_paused",
        "gauge",
        "bool",
        _RANK,
        "1 while the script is inside monitor.paused(): evaluation, checkpoint; no step is expected then.",
    ),
    Metric(
        "gradmon_rank_up",
        "gauge",
        "bool",
        _RANK,
        "1 while the rank's process lives; 0 when it has ended or was killed.",
    ),
    Metric(
        "gradmon_rank_finished",
        "gauge",
        "bool",
        _RANK,
        "1 when the rank ended by itself without an exception.",
    ),
    Metric(
        "gradmon_rank_failed",
        "gauge",
        "bool",
        _RANK,
        "1 when the rank ended by an exception or an exit code; a killed one has neither finished nor failed.",
    ),
    Metric(
        "gradmon_last_heartbeat_age_seconds",
        "gauge",
        "seconds",
        _RANK,
        "Time since the rank's last heartbeat; it beats every 5 s, steps or not. Absent once it has ended.",
    ),
    Metric(
        "gradmon_process_resident_memory_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Resident memory of the rank's process.",
    ),
    Metric(
        "gradmon_snapshot_memory_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Host memory of the rank's snapshots for rollback; absent where rollback is off.",
    ),
    Metric("gradmon_process_cpu_seconds_total", "counter", "seconds", _RANK, "CPU time of the rank's process."),
    Metric("gradmon_process_threads", "gauge", "threads", _RANK, "Threads of the rank's process."),
    Metric(
        "gradmon_process_open_fds",
        "gauge",
        "files",
        _RANK,
        "Open file descriptors of the rank's process: files, sockets, pipes. One that only grows is a leak.",
    ),
    Metric(
        "gradmon_process_read_bytes_total",
        "counter",
        "bytes",
        _RANK,
        "Bytes the rank's process fetched from disks, without what its data loader's workers fetched; "
        "absent where the system does not tell.",
    ),
    Metric(
        "gradmon_process_written_bytes_total",
        "counter",
        "bytes",
        _RANK,
        "Bytes the rank's process sent to disks, checkpoints for instance; absent where the system does not tell.",
    ),
    Metric("gradmon_host_memory_available_bytes", "gauge", "bytes", _HOST, "Memory available on the host."),
    Metric("gradmon_host_memory_capacity_bytes", "gauge", "bytes", _HOST, "All memory of the host."),
    Metric(
        "gradmon_host_swap_used_bytes",
        "gauge",
        "bytes",
        _HOST,
        "Swap space in use on the host; absent on a host without swap.",
    ),
    Metric(
        "gradmon_host_load_average",
        "gauge",
        "1",
        _HOST,
        "Threads that ran or wanted to run on the host, averaged over the last minute.",
    ),
    Metric("gradmon_host_cpus", "gauge", "cpus", _HOST, "Logical CPUs of the host."),
    Metric(
        "gradmon_gpu_memory_allocated_bytes",
        "gauge",
        "bytes",
        _RANK,
        "GPU memory held by tensors (torch allocator); absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_reserved_bytes",
        "gauge",
        "bytes",
        _RANK,
        "GPU memory held by the torch allocator; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_peak_allocated_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Highest GPU memory held by tensors so far; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_peak_reserved_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Highest GPU memory held by the torch allocator so far; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_inactive_split_bytes",
        "gauge",
        "bytes",
        _RANK,
        "GPU memory in free pieces of blocks still partly in use, which can't be given back: fragmentation; "
        "absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_memory_capacity_bytes",
        "gauge",
        "bytes",
        _RANK,
        "All memory of the rank's GPU as torch sees it; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_allocator_retries_total",
        "counter",
        "retries",
        _RANK,
        "Allocations that first failed and went through after the cache was flushed; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_allocator_ooms_total",
        "counter",
        "errors",
        _RANK,
        "Out-of-memory errors of the torch allocator, also those the script caught; absent without a GPU.",
    ),
    Metric(
        "gradmon_gpu_device_memory_used_bytes",
        "gauge",
        "bytes",
        _RANK,
        "Memory in use on the rank's GPU by all processes and the driver (NVML); "
        "absent where the agent can't see the GPU.",
    ),
    Metric(
        "gradmon_gpu_device_memory_capacity_bytes",
        "gauge",
        "bytes",
        _RANK,
        "All memory of the rank's GPU (NVML); absent where the agent can't see the GPU.",
    ),
    Metric(
        "gradmon_gpu_utilisation_ratio",
        "gauge",
        "ratio",
        _RANK,
        "Share of the last moments (up to a second) in which any kernel ran on the rank's GPU, however small (NVML).",
    ),
    Metric("gradmon_gpu_power_watts", "gauge", "watts", _RANK, "Power the rank's GPU draws (NVML)."),
    Metric("gradmon_gpu_temperature_celsius", "gauge", "celsius", _RANK, "Temperature of the rank's GPU (NVML)."),
    Metric(
        "gradmon_gpu_throttled",
        "gauge",
        "bool",
        ("run", "rank", "reason"),
        "1 while the rank's GPU clocks lower than it could, for this reason, else 0 (NVML). sw_power_cap is usual "
        "under full load; the hw_ reasons mean cooling or power supply.",
    ),
    Metric(
        "gradmon_gpu_ecc_errors_total",
        "counter",
        "errors",
        ("run", "rank", "kind"),
        "Memory errors of the rank's GPU since its driver was loaded (NVML): corrected ones cost nothing, uncorrected "
        "ones end the process; absent on GPUs without ECC.",
    ),
    Metric(
        "gradmon_gpu_nvlink_errors_total",
        "counter",
        "errors",
        ("run", "rank", "kind"),
        "Errors on the NVLinks of the rank's GPU, all links together (NVML): repaired on the way, but a link with many "
        "is slow or about to fail; absent without NVLink.",
    ),
    Metric(
        "gradmon_errors_total",
        "counter",
        "errors",
        ("run", "rank", "part"),
        "Failures of gradmon itself inside the training process; training goes on without that part.",
    ),
    Metric("gradmon_agent_errors_total", "counter", "errors", ("part",), "Failures of the agent itself."),
    Metric("gradmon_agent_journals", "gauge", "files", (), "Journals the agent reads."),
    Metric("gradmon_agent_info", "gauge", "1", ("host", "version"), "Always 1; the agent that answers."),
)

METRICS_BY_NAME: dict[str, Metric] = {m.name: m for m in METRICS}
