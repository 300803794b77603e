"""The internals of libraries that the package uses without replacing them, and what it relies on there.

Each name has a canary (`tests/patches/test_canaries.py`). A test finds private names in the source that are missing
here. `module.Class:attribute` is an attribute that the class gives to its instances.
"""

_STAGE = "torch.distributed.pipelining.stage.PipelineStage"
_MODULE = "torch.nn.Module"
_EXPERTS = "transformers.models.mixtral.modeling_mixtral.MixtralExperts"
_ATTENTION = "Recomputation keeps the outputs of this operator, if it is the one that attention used."

# Names that some of the supported releases do not have, and what is done there.
NOT_EVERYWHERE = {
    f"{_STAGE}._setup_forward_recv_info": "torch 2.11: see moreh/runtime/pipeline/older_torch.py",
    f"{_STAGE}._setup_backward_recv_info": "torch 2.11: see moreh/runtime/pipeline/older_torch.py",
    f"{_STAGE}:_runtime_validate": "torch 2.11: see moreh/runtime/pipeline/older_torch.py",
    f"{_STAGE}._validate_fwd_outputs": "torch 2.13: see moreh/runtime/pipeline/older_torch.py",
    f"{_STAGE}._get_init_p2p_neighbors_ops": "torch 2.15: see moreh/runtime/pipeline/older_torch.py",
    f"{_EXPERTS}:_is_expert_parallel": "transformers 5.17: its kernels always skip them",
}

INTERNALS: dict[str, str] = {
    # torch: autograd and tensors
    "torch._C._profiler._RecordFunctionFast": "A span that torch.profiler shows.",
    "torch._C._current_graph_task_id": "It is -1 outside of a backward pass.",
    "torch._C._will_engine_execute_node": "A node of this backward pass; it raises for a leaf of `autograd.grad`.",
    "torch._C._autograd._saved_tensors_hooks_is_enabled": "It is False within disable_saved_tensors_hooks.",
    "torch._C._autograd._top_saved_tensors_default_hooks": (
        "It is None where no hooks on saved tensors are active; the argument ignores those of a tracer."
    ),
    "torch._C._functorch.peek_interpreter_stack": "It is None outside of the transforms of torch.func.",
    "torch._C._get_dispatch_stack_at": "A dispatch mode that a script has put around a call.",
    "torch._C._len_torch_dispatch_stack": "The number of active modes that see each operation.",
    "torch._C._len_torch_function_stack": "The number of active modes that see each call of torch's functions.",
    "torch._C._get_function_stack_at": "The active mode with an index.",
    "torch.utils._python_dispatch.TorchDispatchMode": "It sees matmuls after autograd has made their nodes.",
    "torch.utils._device.DeviceContext": "The mode of `with torch.device(...)`.",
    "torch.autograd.forward_ad._current_level": "It is negative where no forward-mode derivatives are computed.",
    "torch.nn.modules.module._has_any_global_hook": "Whether a hook is registered for all modules.",
    "torch._C._functorch.is_functorch_wrapped_tensor": "It is True for the wrapper tensors of torch.func.",
    "torch._subclasses.fake_tensor.FakeTensor": "Tensors of this class have no data.",
    "torch.Tensor._version": "It counts the changes of a tensor in place.",
    "torch.Tensor._backward_hooks": "It holds the hooks on a parameter's gradient; None or empty without any.",
    "torch.Tensor._post_accumulate_grad_hooks": "It holds such hooks of a parameter; None or empty without any.",
    "torch.UntypedStorage._cdata": (
        "It is the address of the storage's C++ object, equal for all objects that share it."
    ),
    "torch.multiprocessing.reductions.StorageWeakRef": (
        "expired() tells that a storage was freed; the reference keeps its address from being used again."
    ),
    "torch.Tensor._make_wrapper_subclass": "Makes a tensor of a class that has a geometry and no memory.",
    "torch._C.DisableTorchFunctionSubclass": "In it, a subclass of Tensor is an ordinary tensor to torch's functions.",
    "torch._C._disabled_torch_function_impl": "A __torch_function__ that lets all functions of torch pass.",
    "torch._ops.OpOverload:_schema": "The operator's arguments and returns; alias_info tells what it writes or views.",
    "torch.ops.aten._to_copy": "The copy of a tensor in another dtype or on another device.",
    "torch.utils._pytree.tree_map": "Maps the leaves of nested lists, tuples and dictionaries.",
    "torch._softmax_backward_data": "The backward pass of softmax, from its output.",
    "torch._embedding_bag_forward_only": "Sums rows of a matrix by offsets, without autograd.",
    # torch: modules and optimizers
    f"{_MODULE}._apply": "Applies a function to all parameters and buffers in place.",
    f"{_MODULE}:_parameters": "A dictionary of the module's own parameters, which may be exchanged in it.",
    f"{_MODULE}:_buffers": "A dictionary of the module's own buffers.",
    f"{_MODULE}:_modules": "A dictionary of the module's children, which may be exchanged in it.",
    f"{_MODULE}:_non_persistent_buffers_set": "The names of buffers that are not in the state dict.",
    f"{_MODULE}:_forward_hooks": "Empty where a module has no such hooks.",
    f"{_MODULE}:_forward_pre_hooks": "Empty where a module has no such hooks.",
    f"{_MODULE}:_backward_hooks": "Empty where a module has no such hooks.",
    f"{_MODULE}:_backward_pre_hooks": "Empty where a module has no such hooks.",
    f"{_MODULE}:_load_state_dict_post_hooks": "A dictionary of the hooks that load_state_dict calls at its end.",
    "torch.nn.modules.batchnorm._BatchNorm": "The base class of all batch normalizations.",
    "torch.nn.utils.parametrizations._SpectralNorm": "The parametrization of spectral_norm; its forward changes it.",
    "torch.nn.modules.dropout._DropoutNd": "The base class of all dropouts; `p` is the rate.",
    "torch._dynamo.eval_frame.OptimizedModule:_orig_mod": "The module that torch.compile wraps.",
    "torch.optim.Optimizer.__init__": "Every optimizer calls it.",
    "torch.optim.Adam._init_group": "Each step calls it for each group, and reads the group's `fused` afterwards.",
    "torch.nn.utils.clip_grad._get_total_norm": "clip_grad_norm_ and get_total_norm look it up when they are called.",
    "torch.utils._foreach_utils._get_fused_kernels_supported_devices": (
        "The types of devices that have fused optimizers."
    ),
    "torch.utils._pytree.tree_flatten": "The leaves of nested lists, tuples and dictionaries, and their structure.",
    "torch.utils._pytree.tree_unflatten": "The reverse of tree_flatten.",
    "torch.utils._pytree.tree_leaves": "The leaves of nested lists, tuples and dictionaries.",
    "torch.utils._pytree.tree_map_only": "Maps the leaves of one type.",
    # torch: functions that create tensors, TorchScript
    "torch.utils._device._device_constructors": "The set of functions for which `with torch.device(...)` works.",
    "torch.jit._builtins._get_builtin_table": "It builds and returns `_builtin_table`.",
    # torch: attention in recomputation
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": _ATTENTION,
    "torch.ops.aten._scaled_dot_product_flash_attention": _ATTENTION,
    "torch.ops.aten._scaled_dot_product_efficient_attention": _ATTENTION,
    "torch.ops.aten._scaled_dot_product_cudnn_attention": _ATTENTION,
    # torch: distributed
    "torch.distributed.distributed_c10d._get_default_store": "The store in which workers note the calls they share.",
    "torch.distributed.fsdp._fully_shard._fsdp_api.ReduceScatter": (
        "The interface of what set_custom_reduce_scatter takes."
    ),
    f"{_STAGE}._setup_forward_recv_info": "Makes args_recv_info, with buffers on self.device.",
    f"{_STAGE}._setup_backward_recv_info": "Makes grad_recv_info, with buffers on self.device.",
    f"{_STAGE}.get_fwd_recv_ops": "Receives into the buffers of args_recv_info.",
    f"{_STAGE}.get_bwd_recv_ops": "Receives into the buffers of grad_recv_info.",
    f"{_STAGE}.forward_one_chunk": "Reads the buffers of args_recv_info.",
    f"{_STAGE}.backward_one_chunk": "Reads the buffers of grad_recv_info.",
    f"{_STAGE}:args_recv_info": "By micro-batch: what is received in the forward pass.",
    f"{_STAGE}:grad_recv_info": "By micro-batch: what is received in the backward pass.",
    f"{_STAGE}:has_backward": "Whether there is a backward pass.",
    f"{_STAGE}:device": "Where the buffers are made.",
    f"{_STAGE}._prepare_forward_infra": "Before torch 2.13, makes args_recv_info, with buffers on self.device.",
    f"{_STAGE}._prepare_backward_infra": "Before torch 2.13, makes grad_recv_info, with buffers on self.device.",
    f"{_STAGE}._get_init_p2p_neighbors_ops": "Before torch 2.13, the first messages to neighboring stages.",
    f"{_STAGE}._retrieve_recv_activations": "Gives the buffers of a micro-batch's hidden states.",
    f"{_STAGE}._validate_fwd_outputs": "Before torch 2.13, compares shapes with those of the first step.",
    f"{_STAGE}:_runtime_validate": "Whether shapes are compared with those of the first step.",
    f"{_STAGE}.backward_maybe_with_nosync": "Computes all gradients, or those of the inputs or of the weights.",
    "torch.distributed.pipelining._backward.stage_backward_input": (
        "Its groups have params, and the intermediates with the gradients of their outputs, grads."
    ),
    "torch.distributed.pipelining.stage._RecvInfo": "is_root_arg, tensor_meta and buffer of what is received.",
    "torch.distributed._checkpointable._Checkpointable": (
        "The methods by which torch.distributed.checkpoint asks an object what to write and read."
    ),
    "torch.amp.autocast_mode.autocast_decorator": "Its wrapper has the closure variable autocast_instance.",
    "torch.amp.autocast_mode.autocast:fast_dtype": "The dtype of an autocast.",
    # transformers and accelerate
    "transformers.modeling_utils.PreTrainedModel.from_pretrained": "It calls _load_pretrained_model.",
    "transformers.modeling_utils.PreTrainedModel._load_pretrained_model": (
        "Called with model, state_dict, checkpoint_files, load_config while the model is on the meta device."
    ),
    "transformers.modeling_utils.LoadStateDictConfig": "dtype_plan, hf_quantizer and disable_mmap of what is loaded.",
    "transformers.core_model_loading.build_glob_alternation": (
        "One pattern of many, with the key of each of its groups."
    ),
    "transformers.core_model_loading.revert_weight_conversion": "The state dict as it is saved.",
    "transformers.modeling_utils.PreTrainedModel.save_pretrained": (
        "It calls split_torch_state_dict_into_shards and safe_save_file of its module."
    ),
    "transformers.modeling_utils.safe_save_file": "Called with tensors, filename and metadata.",
    "transformers.modeling_utils.split_torch_state_dict_into_shards": (
        "Called with the state dict, filename_pattern and max_shard_size."
    ),
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "Looked up in each forward pass of a layer.",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "What block attention stands in for.",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward": "What fused_norm stands in for.",
    "peft.tuners.lora.layer.Linear.forward": "What fused_lora stands in for.",
    "peft.tuners.lora.layer.LoraLayer:_disable_adapters": "Of each layer with adapters: True while they are off.",
    "peft.tuners.lora.layer.LoraLayer:_active_adapter": "The names of the adapters that compute.",
    "transformers.activations.NewGELUActivation.forward": "What fused_activation stands in for.",
    "transformers.loss.loss_utils.ForCausalLMLoss": "The loss that the runtime computes in its own way.",
    "transformers.modeling_utils.PreTrainedModel.warn_if_padding_and_no_attention_mask": "Models call it.",
    "transformers.PreTrainedConfig._experts_implementation": "How a model computes its experts.",
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts:_is_expert_parallel": "Kernels skip others' experts.",
    "transformers.PreTrainedConfig._attn_implementation": "The attention function that a model uses.",
    "accelerate.utils.operations.ConvertOutputsToFp32": "accelerate's wrapper of a forward pass in bfloat16.",
}

# What the source uses without spelling its name, with the word by which it does.
WORDS: dict[str, str] = {
    "torch.distributed.pipelining.stage._RecvInfo": "is_root_arg",
    "torch.distributed.pipelining._backward.stage_backward_input": "intermediates",
    "torch.distributed._checkpointable._Checkpointable": "__create_write_items__",
    "torch.amp.autocast_mode.autocast_decorator": "autocast_instance",
    "transformers.modeling_utils.LoadStateDictConfig": "load_config",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "sdpa",
    "accelerate.utils.operations.ConvertOutputsToFp32": "operations.py",
}
