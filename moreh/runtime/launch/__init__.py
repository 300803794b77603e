"""Several workers on one machine that behave as one program. What happens, in order:

1. `launcher`: `enable_advanced_parallelization` in the user's process wants several workers. It starts the process's
   own command line once for each, through torch.distributed.elastic, and never returns to the script.
2. `moreh.bootstrap`: the first lines of a new worker process. It ties the worker's life to the launcher's, sends what
   workers other than 0 write to their logs, and becomes the user's command.
3. `world`: the script runs again in each worker, up to the same call. There the workers join a process group. Under
   torchrun, a run begins here.
4. `supervisor`: meanwhile the launcher waits. It passes signals on, and decides when workers that do not end have to be
   killed. `worker_errors`: a worker that ends with an exception leaves a record of it in a file. `heartbeat`: a worker
   says where it is, and `watch` notices that all of them are silent.
5. `exit_report`: from exit codes and records, the launcher finds the worker that failed first and ends with its exit
   code. It names that worker, unless worker 0 has shown the same error on the console already. `restarts`: or it
   starts all of them again.

The agent of torch.distributed.elastic, which torchrun uses, would do 4 and 5 differently: it ends all workers at the
first failure, before worker 0 can print an error that all ranks hit, and reports failures as a table after all
tracebacks. A program of one process shows one traceback.

`collective_errors` is used while workers compute: an error on one rank becomes an error on all of them.
"""
