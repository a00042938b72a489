"""How Celery is run, each value with its reason. URLs and expiry come from the settings (``courier/settings.py``).

Shared by the worker and by every program that enqueues through ``producer``.
"""

from kombu.entity import Exchange, Queue

from courier.queues import BATCHES, CELERYS_OWN, JOBS, QUEUE_OF, QUEUES

# A message is acknowledged when its job has ended, not when it arrives: a killed worker loses nothing.
task_acks_late = True
task_reject_on_worker_lost = True
# One message per slot; further ones stay in Redis, where any worker can take them.
worker_prefetch_multiplier = 1
# Longer than the longest job. Recovery does not wait for it: the ledger's leases are seconds (docs/architecture.md).
broker_transport_options = {
    "visibility_timeout": 7200,
    "socket_timeout": 30,  # without one a half-open connection blocks for ever
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
    # What workers have taken and not acknowledged: another application has a visibility_timeout of its own.
    "unacked_key": "pacs.unacked",
    "unacked_index_key": "pacs.unacked_index",
    "unacked_mutex_key": "pacs.unacked_mutex",
}
broker_connection_retry_on_startup = True
broker_connection_max_retries = None
# A Redis that fails over (READONLY) or cannot serve now (BUSY, MISCONF, NOREPLICAS) is one that is away for a while.
broker_channel_error_retry = True
redis_socket_timeout = 30.0
redis_socket_connect_timeout = 5.0
redis_socket_keepalive = True
redis_backend_health_check_interval = 25

# JSON only, and nothing of the arguments in results: they may hold presigned URLs.
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]
result_extended = False
# "Started" would be written before the claim, and so over a failure or over what a parked job waits for, by any message
# that comes twice. A job that takes longer than a beat shows its stages instead (worker/jobs/attempt.py).
task_track_started = False
# A store that fails for a moment is tried again: Celery would call the job failed, whatever the ledger says.
result_backend_always_retry = True
result_backend_max_retries = 10

# Events for Flower. What they show of the arguments is redacted (worker/app.py, producer/client.py).
worker_send_task_events = True
task_send_sent_event = True

# Threads, because a job waits for sources and servers; the in-process limit is the time-out of each wait.
# `--pool prefork` on the command line is overruled by this, `--pool processes`, which is the same pool, is not.
worker_pool = "threads"
worker_concurrency = 8
# A soft shutdown (SIGQUIT) gives running jobs this long; what is left is done by another worker (worker/pool.py).
worker_soft_shutdown_timeout = 20.0
# Threads cannot be cancelled, and a job delivered again finds its lease held: nothing to cancel on a lost connection.
worker_cancel_long_running_tasks_on_connection_loss = False
worker_hijack_root_logger = False
worker_redirect_stdouts = False

# Names of our own (courier/queues.py): what else uses this Redis most likely has a queue `celery`, and each would throw
# the other's messages away. As objects, because Flower lists no others while no worker answers.
task_default_queue = JOBS
task_create_missing_queues = True
_exchange = Exchange(JOBS)  # type: ignore[no-untyped-call]  # kombu is untyped
task_queues = [Queue(name, _exchange, routing_key=name) for name in QUEUES]  # type: ignore[no-untyped-call]
# A follow-up of another application (`link`, `chain`) that names no queue goes where its own application would send it.
# A kind of batch that a worker loads beside ours (`celery worker -I`) is ours, too.
task_routes = {
    **{task: {"queue": queue} for task, queue in QUEUE_OF.items()},
    "pacs.batch.*": {"queue": BATCHES},
    "*": {"queue": CELERYS_OWN},
}
timezone = "UTC"
