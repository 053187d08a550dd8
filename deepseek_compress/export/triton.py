"""A model repository for Triton Inference Server, and the Kubernetes objects that run and scale it.

Requests carry their cache (`past.*` in, `present.*` out), so that any replica can take any step. Triton batches the
requests whose other dimensions agree; the queue is bounded, and a request that waited too long is refused rather than
served late. The autoscaler follows the time that requests wait in the queue, which Triton exports to Prometheus.

Written from the protobuf text format of `model_config.proto` (Triton 24-25); not run here: no server is at hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from deepseek_compress.export import Range

TYPES = {
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.BFLOAT16: "TYPE_BF16",
}
QUEUE_MICROSECONDS = 2000  # how long a request may wait for others to be batched with
TIMEOUT_MICROSECONDS = 2_000_000  # how long it may wait at all
QUEUE_LENGTH = 256


def write_repository(model: Path, out: Path, *, batch: Range, new: Range, past: Range, replicas: int = 8) -> None:
    """Beside `model` (model_repository/NAME/1/model.onnx): config.pbtxt; in `out`: kubernetes.yaml, prometheus.yaml."""
    graph = onnx.load(str(model), load_external_data=False).graph
    folder = model.parent.parent
    (folder / "config.pbtxt").write_text(config(folder.name, graph, batch, new, past))
    (out / "kubernetes.yaml").write_text(_KUBERNETES.format(name=folder.name, replicas=replicas))
    (out / "prometheus.yaml").write_text(_PROMETHEUS)


def config(name: str, graph: onnx.GraphProto, batch: Range, new: Range, past: Range) -> str:
    """config.pbtxt of the graph: inputs and outputs without the batch dimension, batching, warm-up."""
    inputs = ",\n".join(_tensor(value) for value in graph.input)
    outputs = ",\n".join(_tensor(value) for value in graph.output)
    return _CONFIG.format(
        name=name,
        batch=batch.most,
        inputs=inputs,
        outputs=outputs,
        preferred=", ".join(str(size) for size in sorted({max(1, batch.most // 2), batch.most})),
        delay=QUEUE_MICROSECONDS,
        timeout=TIMEOUT_MICROSECONDS,
        queue=QUEUE_LENGTH,
        prefill=_sample("prefill", graph, new.most, 0),
        decode=_sample("decode", graph, 1, max(1, past.usual)),
    )


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Dimensions after the batch, -1 where they vary."""
    return [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim[1:]]


def _tensor(value: onnx.ValueInfoProto) -> str:
    kind = TYPES[value.type.tensor_type.elem_type]
    return f'  {{ name: "{value.name}" data_type: {kind} dims: {_dims(value)} }}'


def _sample(name: str, graph: onnx.GraphProto, new: int, past: int) -> str:
    """One warm-up request of `new` tokens after `past`."""
    lengths = {"input_ids": new, "position_ids": new, "attention_mask": new + past}
    rows = []
    for value in graph.input:
        dims: list[Any] = [lengths.get(value.name, past) if size < 0 else size for size in _dims(value)]
        kind = TYPES[value.type.tensor_type.elem_type]
        rows.append(f'    inputs {{ key: "{value.name}" value {{ data_type: {kind} dims: {dims} zero_data: true }} }}')
    body = "\n".join(rows)
    return f'  {{\n    name: "{name}"\n    batch_size: 1\n{body}\n  }}'


_CONFIG = """\
name: "{name}"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {batch}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {delay}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {timeout}
    allow_timeout_override: true
    max_queue_size: {queue}
  }}
}}
instance_group [
  {{ count: 1 kind: KIND_AUTO }}
]
model_warmup [
{prefill},
{decode}
]
"""

_KUBERNETES = """\
# Triton with the model repository mounted at /models, scaled by the time that requests wait in its queue.
# The autoscaler needs the custom metrics API, which the Prometheus adapter serves from prometheus.yaml's rule.
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  selector:
    matchLabels: {{app: {name}}}
  template:
    metadata:
      labels: {{app: {name}}}
      annotations:
        prometheus.io/scrape: "true"
        prometheus.io/port: "8002"
        prometheus.io/path: /metrics
    spec:
      terminationGracePeriodSeconds: 60
      containers:
        - name: triton
          image: nvcr.io/nvidia/tritonserver:25.08-py3
          args: [tritonserver, --model-repository=/models, --exit-timeout-secs=50]
          ports:
            - {{name: http, containerPort: 8000}}
            - {{name: grpc, containerPort: 8001}}
            - {{name: metrics, containerPort: 8002}}
          resources:
            limits: {{nvidia.com/gpu: 1}}
          startupProbe:
            httpGet: {{path: /v2/health/ready, port: http}}
            periodSeconds: 5
            failureThreshold: 120
          readinessProbe:
            httpGet: {{path: /v2/health/ready, port: http}}
          livenessProbe:
            httpGet: {{path: /v2/health/live, port: http}}
          volumeMounts:
            - {{name: models, mountPath: /models, readOnly: true}}
      volumes:
        - name: models
          persistentVolumeClaim: {{claimName: {name}-models}}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: http, port: 8000}}
    - {{name: grpc, port: 8001}}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {name}
spec:
  scaleTargetRef: {{apiVersion: apps/v1, kind: Deployment, name: {name}}}
  minReplicas: 1
  maxReplicas: {replicas}
  metrics:
    - type: Pods
      pods:
        metric: {{name: triton_queue_milliseconds}}
        target: {{type: AverageValue, averageValue: "50"}}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: 300
"""

_PROMETHEUS = """\
# Rule for the Prometheus adapter: mean time in the queue per request over the last minute, in milliseconds.
rules:
  - seriesQuery: nv_inference_queue_duration_us{namespace!="",pod!=""}
    resources:
      overrides:
        namespace: {resource: namespace}
        pod: {resource: pod}
    name:
      as: triton_queue_milliseconds
    metricsQuery: >-
      sum(rate(nv_inference_queue_duration_us{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>) / 1000
      / clamp_min(sum(rate(nv_inference_request_success{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>), 0.001)
"""
