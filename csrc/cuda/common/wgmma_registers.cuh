// The lists of accumulator registers that the wgmma instruction spells out: text and operands, 16 at a time.
#pragma once

// clang-format off
#define KF_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define KF_TEXT_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KF_TEXT_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define KF_TEXT_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KF_TEXT_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define KF_TEXT_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KF_TEXT_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define KF_TEXT_112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define KF_REGISTERS_32 KF_TEXT_0 ", " KF_TEXT_16
#define KF_REGISTERS_48 KF_TEXT_0 ", " KF_TEXT_16 ", " KF_TEXT_32
#define KF_REGISTERS_64 KF_TEXT_0 ", " KF_TEXT_16 ", " KF_TEXT_32 ", " KF_TEXT_48
#define KF_REGISTERS_80 KF_TEXT_0 ", " KF_TEXT_16 ", " KF_TEXT_32 ", " KF_TEXT_48 ", " KF_TEXT_64
#define KF_REGISTERS_96 KF_TEXT_0 ", " KF_TEXT_16 ", " KF_TEXT_32 ", " KF_TEXT_48 ", " KF_TEXT_64 ", " KF_TEXT_80
#define KF_REGISTERS_128 KF_TEXT_0 ", " KF_TEXT_16 ", " KF_TEXT_32 ", " KF_TEXT_48 ", " KF_TEXT_64 ", " KF_TEXT_80 ", " KF_TEXT_96 ", " KF_TEXT_112

#define KF_OPERANDS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KF_OPERANDS_16(d, i) KF_OPERANDS_4(d, i), KF_OPERANDS_4(d, i + 4), KF_OPERANDS_4(d, i + 8), KF_OPERANDS_4(d, i + 12)
#define KF_OPERANDS_32(d) KF_OPERANDS_16(d, 0), KF_OPERANDS_16(d, 16)
#define KF_OPERANDS_48(d) KF_OPERANDS_32(d), KF_OPERANDS_16(d, 32)
#define KF_OPERANDS_64(d) KF_OPERANDS_48(d), KF_OPERANDS_16(d, 48)
#define KF_OPERANDS_80(d) KF_OPERANDS_64(d), KF_OPERANDS_16(d, 64)
#define KF_OPERANDS_96(d) KF_OPERANDS_80(d), KF_OPERANDS_16(d, 80)
#define KF_OPERANDS_128(d) KF_OPERANDS_96(d), KF_OPERANDS_16(d, 96), KF_OPERANDS_16(d, 112)
// clang-format on
