"""The orchestration: one module per DVC stage, around the library `ris_core`.

Ray and MLflow read their environment when they are imported, so it is set here, before anything of this package can import
them: nobody phones home, workers print through the driver once. What the caller has set stays.
"""

import os

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    # A busy cluster is waited for again and again, each time this long (ray_training.fit).
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
