"""distributed.py: ranks from the environment, sharing rank 0's state, stop requests, lost peers."""
import os
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import FORKS, ROOT, TINY, differences, free_port, patched_train, start_ranks, succeed

from support import distributed, rendezvous
from support.errors import UserError


@pytest.fixture
def environ(monkeypatch):
    """A function that sets these, and only these, of the variables that identify a process."""
    def make(**variables):
        for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    return make


@pytest.mark.parametrize(('variables', 'expected'), [
    ({}, (0, 0, 1)), ({'RANK': '3', 'WORLD_SIZE': '8'}, (3, 0, 8)),
    ({'RANK': '9', 'LOCAL_RANK': '1', 'WORLD_SIZE': '16'}, (9, 1, 16))])
def test_rank_and_world_size_come_from_the_environment(environ, variables, expected):
    environ(MASTER_ADDR='127.0.0.1', MASTER_PORT='29500', **variables)
    assert distributed.environment() == expected


MEETING = 'WORLD_SIZE=2: expected MASTER_ADDR and MASTER_PORT'


@pytest.mark.parametrize(('variables', 'named'), [
    ({'RANK': '-1'}, 'RANK=-1'), ({'RANK': '2'}, 'RANK=2'), ({'LOCAL_RANK': ''}, 'LOCAL_RANK='),
    ({'WORLD_SIZE': '2.0'}, 'WORLD_SIZE=2.0'), ({'WORLD_SIZE': '0'}, 'WORLD_SIZE=0'),
    ({'MASTER_PORT': '29500'}, MEETING), ({'MASTER_ADDR': '127.0.0.1'}, MEETING),
    ({'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '65536'}, MEETING)])
def test_invalid_environment_variables_are_named(environ, variables, named):
    environ(**{'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2', **variables})
    with pytest.raises(UserError, match=named) as error:
        distributed.environment()
    assert '\n' not in str(error.value)


STATE = {
    'plain': {'n': 3, 'x': [0.5, None, True, 'é', {}], 'inf': float('inf'), '0': 1},
    'optimizer': {0: {'exp_avg': torch.linspace(0, 1, 6).view(3, 2), 'step': torch.tensor(7)},
                  'betas': (0.9, 0.95)},
    'low': [torch.ones(3).half(), torch.arange(4), torch.zeros(0, 5)],
}


def share_one_state(rank, port, path):
    """Save what one of two processes gets from rank 0, and its copy of rank 0's weights."""
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    rendezvous.join('gloo', {}, 60)
    got = distributed.share(STATE if rank == 0 else {}, torch.device('cpu'))
    torch.manual_seed(rank)
    model = torch.nn.Linear(3, 2)
    distributed.share_weights(model)
    torch.save([got, model.state_dict()], f'{path}/{rank}.pt')


def test_all_processes_get_rank_0s_state_and_weights_bit_for_bit(tmp_path):
    port = str(free_port())
    processes = [FORKS.Process(target=share_one_state, args=(rank, port, tmp_path))
                 for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    torch.manual_seed(0)
    expected = [STATE, dict(torch.nn.Linear(3, 2).state_dict())]
    for state, weights in first, second:
        assert repr(state) == repr(STATE)  # keys, types, order, shapes and dtypes
        assert differences([state, dict(weights)], expected) == []


def test_torchrun_on_one_node_is_suggested_again(monkeypatch):
    assert distributed.launcher() == []
    monkeypatch.setattr(distributed, 'UNDER_TORCHRUN', True)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    monkeypatch.setenv('WORLD_SIZE', '8')  # of two nodes: a job's, to be created again
    assert distributed.launcher() == []
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert distributed.launcher() == ['-m', 'torch.distributed.run', '--standalone',
                                      '--nproc_per_node=4']


# What a process of a run with changed code needs.
PATCHED = (*TINY, '--max_iters=2', '--dist_timeout=20')


def test_an_evaluation_has_fewer_batches_than_processes_though_the_model_has_a_buffer(
        data_set, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    script = patched_train(tmp_path, """
        class WithBuffer(model.GPT):
            def __init__(self, config):
                super().__init__(config)
                self.register_buffer('angles', torch.ones(8), persistent=False)
        model.GPT = WithBuffer""")
    succeed(start_ranks(2, script, *PATCHED, '--eval_iters=1', f'--dataset={data_set}',
                        f'--out_dir={tmp_path}/out'))


def test_a_wrong_optimizer_is_refused_before_the_first_pass_which_may_have_to_compile(
        data_set, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    script = patched_train(tmp_path, """
        distributed.warm_up_ddp = lambda *args: sys.exit('the first pass')""")
    for rank in start_ranks(2, script, *PATCHED, '--optimizer=adam', f'--dataset={data_set}',
                            f'--out_dir={tmp_path}/out'):
        rank.wait()
        assert rank.code == 1 and 'expected adamw or muon' in rank.err


def test_a_single_process_keeps_its_state():
    assert distributed.share(STATE, torch.device('cpu')) is STATE


@pytest.mark.parametrize(('text', 'lost'), [
    ('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41234', True),
    ('[gloo/transport/tcp/pair.cc:598] Read error [::1]:2: Connection reset by peer', True),
    ('[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv', True),
    ('Gloo connectFullMesh failed with [pair.h:311] Connect timeout [none]', True),
    ('Socket Timeout', True),
    ('[gloo/transport/tcp/socket.cc:142] connect: No route to host', True),
    ('NCCL error: remote process exited or there was a network error', True),
    ('wait timeout after 600000ms, keys: /default_pg/0//cpu//0', True),
    ('Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, Timeout(ms)=600000)', True),
    ("read() got an unexpected keyword argument 'timeout_ms'", False),
    ('CUDA out of memory. Tried to allocate 2.00 GiB', False),
    ('mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)', False),
    ('Expected all tensors to be on the same device', False),
])
def test_only_communication_errors_count_as_a_lost_process(text, lost, environ, monkeypatch):
    ends = Mock(side_effect=SystemExit)
    monkeypatch.setattr(distributed, 'exit_now', ends)
    environ(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
    for error, expected in (RuntimeError(text), lost), (ValueError(text), False):
        with pytest.raises(SystemExit if expected else type(error)), distributed.lost_peers():
            raise error
    assert [call.args[0] for call in ends.mock_calls] == [138] * lost


# ------------------------------------------------------------------------ when to stop

@pytest.fixture
def signals(monkeypatch):
    """A StopRequest, the exit codes with which it would have ended this process (`ends`), and a
    function that sends a signal at a given time in seconds."""
    handlers, ends = {}, []
    monkeypatch.setattr(signal, 'signal', handlers.__setitem__)
    monkeypatch.setattr(distributed, 'exit_now', ends.append)
    stop = distributed.StopRequest()

    def send(number, at_s=0):
        monkeypatch.setattr(distributed, 'time', SimpleNamespace(monotonic=lambda: at_s))
        handlers[number](number, None)
        return stop.exit_code

    return SimpleNamespace(stop=stop, ends=ends, send=send)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_the_loop_a_signal_exits_at_once(signals, number, code):
    signals.send(number)
    assert signals.ends == [code]


def test_in_the_loop_a_signal_is_recorded_and_sigterm_wins(signals):
    signals.stop.armed = True
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT
    assert [signals.send(number) for number in numbers] == [130, 143, 143, 143]
    assert signals.ends == []


def test_a_second_ctrl_c_exits_at_once(signals):
    signals.stop.armed = True
    signals.send(signal.SIGINT, 10)
    signals.send(signal.SIGINT, 10.5)  # torchrun in a terminal forwards it: this is still the first
    assert signals.ends == []
    signals.send(signal.SIGINT, 11.6)
    assert signals.ends == [130]
