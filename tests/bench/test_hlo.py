"""What is read from a compiled program's text, on made-up programs and on real ones."""

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from persyn_jax.bench import hlo
from persyn_jax.bench.hlo import collectives
from persyn_jax.mesh import FSDP, WORKER, make_mesh

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_multiply (param_0.1: f32[8,8]) -> f32[8,8] {
  %param_0.1 = f32[8,8]{1,0} parameter(0)
  ROOT %convolution.1 = f32[8,8]{1,0} convolution(%param_0.1, %param_0.1), dim_labels=bf_io->bf
}

%body (param.2: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %param.2 = (s32[], f32[8,8]{1,0}) parameter(0)
  %fusion.2 = f32[8,8]{1,0} fusion(%param.2), kind=kOutput, calls=%fused_multiply
  ROOT %tuple.2 = (s32[], f32[8,8]{1,0}) tuple(%param.2, %fusion.2)
}

%fused_gather.1 (param_0.3: bf16[2]) -> bf16[8] {
  ROOT %all-gather.1 = bf16[8]{0} all-gather(%param_0.3), replica_groups={{0,1},{2,3}}, \
frontend_attributes={chain_id="5"}
}

%fused_gather.2 (param_0.4: bf16[2]) -> bf16[8] {
  ROOT %all-gather.2 = bf16[8]{0} all-gather(%param_0.4), replica_groups={{0,1},{2,3}}, \
frontend_attributes={chain_id="5"}
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0:T(8,128)} parameter(0), metadata={op_name="all-reduce(x)"}
  %s.1 = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0}, u32[]) collective-permute-start(%p), \
source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %w = (s32[], f32[8,8]{1,0}) while(%p), condition=%c, body=%body
  %f = f32[8,8]{1,0} fusion(%w), kind=kOutput, calls=%fused_multiply
  %d.1 = f32[8,8]{1,0} collective-permute-done(%s.1)
  %s.2 = (f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]) collective-permute-start(%d.1), \
source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %add.1 = f32[8,8]{1,0} add(%d.1, %d.1)
  %d.2 = f32[8,8]{1,0} collective-permute-done(%s.2)
  %send.1 = (bf16[4]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="a",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[4]{0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="a",_xla_megascale_transfer_type="ALL_REDUCE"}
  %dot.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %send-done.1 = token[] send-done(%send.1), channel_id=1
  %recv-done.1 = (bf16[4]{0}, token[]) recv-done(%recv.1), channel_id=2
  %recv.2 = (f32[]{:T(128)}, u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target={{100000->200000}},_xla_megascale_transfer_type=\
"ONE_TO_ONE"}
  %recv-done.2 = (f32[], token[]) recv-done(%recv.2), channel_id=3
  %rs = f32[4]{0} reduce-scatter(%p), replica_groups=[2,2]<=[4], dimensions={0}, to_apply=%add
  %ag.1 = f32[8]{0} all-gather(%rs), replica_groups=mesh['w'=2,'f'=2] {'f'}, dimensions={0}
  %ag.2 = f32[8]{0} all-gather(%rs), replica_groups=mesh['w'=2,'f'=2] {'w'}, dimensions={0}
  ROOT %ar = f32[8,8]{1,0} all-reduce(%d.2), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
}
"""


def test_every_collective_is_found_once_with_its_link_size_and_what_it_overlaps():
    """Two chips to a worker: chips 0 and 1, 2 and 3."""
    found = [
        (one.kind, one.link, one.is_asynchronous, one.size, one.products)
        for one in collectives(PROGRAM, chips_per_worker=2)
    ]
    assert found == [
        ("all-gather", "inside workers", True, 16, 0),  # two parts of one chain
        ("collective-permute", "between workers", True, 256, 2),  # a loop and a fusion
        ("collective-permute", "between workers", True, 256, 0),  # an addition is no product
        ("all-reduce", "between slices", True, 8, 1),
        ("collective-permute", "between slices", True, 4, 0),
        ("reduce-scatter", "inside workers", False, 16, 0),
        ("all-gather", "inside workers", False, 32, 0),
        ("all-gather", "between workers", False, 32, 0),
        ("all-reduce", "between workers", False, 256, 0),
    ]


def test_with_a_chip_a_worker_every_group_is_between_workers():
    links = {one.link for one in collectives(PROGRAM, chips_per_worker=1)}
    assert links == {"between workers", "between slices"}


def test_devices_that_cannot_be_read_are_an_error_and_not_a_guess():
    program = PROGRAM.replace("[2,2]<=[4]", "elsewhere")
    with pytest.raises(ValueError, match="cannot be read: %p"):
        collectives(program, chips_per_worker=1)


def test_a_real_program():
    mesh = make_mesh(2, 4)

    def one_device(x):
        swapped = lax.ppermute(x, WORKER, [(0, 1), (1, 0)])
        return lax.psum(x, FSDP), lax.all_gather(swapped, WORKER), lax.psum(x, (WORKER, FSDP))

    mapped = jax.shard_map(
        one_device, mesh=mesh, in_specs=P(WORKER, FSDP), out_specs=P(WORKER, FSDP), check_vma=False
    )
    compiled = jax.jit(mapped).lower(np.ones((4, 8), np.float32)).compile()
    found = [(one.kind, one.link, one.size) for one in collectives(compiled.as_text(), 4)]
    assert sorted(found) == [
        ("all-gather", "between workers", 32),
        ("all-reduce", "between workers", 16),
        ("all-reduce", "inside workers", 16),
        ("collective-permute", "between workers", 16),
    ]


def test_devices_of_a_mesh_may_be_reshaped_and_transposed():
    """Two workers of four chips each; the groups are made of every other chip of a worker."""
    sizes = "mesh['axis_0'=2,'axis_1'=1,'axis_2'=4]"
    groups = hlo._device_groups(
        f"%p), replica_groups={sizes}, device_ids=([2,2,2]T(0,2,1)) {{'axis_2'}}, dimensions"
    )
    assert groups == [[0, 2, 1, 3], [4, 6, 5, 7]]
    groups = hlo._device_groups(
        "%p), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'b'}, dimensions"
    )
    assert groups == [[0, 2], [4, 6], [1, 3], [5, 7]]
