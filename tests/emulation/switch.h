// From one stack to another. swapcontext does it too, with a system call each time.
#pragma once

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif
// Save the registers that a function keeps and the stack pointer; take those that were saved at `next`.
extern "C" void emulation_switch(void** saved, void* next);
asm(R"(
    .text
    .hidden emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
    .size emulation_switch, .-emulation_switch
)");
